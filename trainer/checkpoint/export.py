"""Export of a run's trained weights as a model: in the public release's layout, or only the trained part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from ...recipes import Recipe, load_recipe
from ...recipes.branch import Backbone, Branch, Lora
from ...recipes.secrets import redact
from ...slurm.run_folder import no_checkpoint
from ..errors import RunError, writing
from ..models.backbone import read_config
from ..models.backbone_config import branch_layers, grid_side
from ..models.controlnet_config import ControlNetConfig
from ..models.hub import locate
from ..models.latent_controlnet import write_config
from ..models.weights import WeightFiles, is_trained, public_base_name, public_name
from ..stages import open_controlnet
from .durable import WHOLE, write_file
from .merged import merged
from .merged_controlnet import MergedControlNet
from .model_card import CARD, card
from .reader import CheckpointReader
from .safetensors_parts import Piece, safetensors_parts
from .state import CheckpointWeights
from .store import Store

Layout = Literal["public", "hf"]
SHARD_BYTES = 5 * 10**9
_FULL = {"weights": "full", "lora": Lora()}
"""Settings of a branch in the public layout, in which low-rank pairs are merged into the weights."""


def export(
    run: Path,
    out: Path,
    layout: Layout,
    dtype: torch.dtype = torch.bfloat16,
    ema: bool = False,
    step: int | None = None,
) -> int:
    """Write the run's newest verified checkpoint, or that of `step`, as safetensors into `out`; return the step.

    Stage 1, public: frozen base and trained part under the public release's names, low-rank pairs merged; hf: only the
    trained part, with transformers' module names and the recipe as `config.json`. Stage 2: the `flux_controlnet` folder
    for both layouts, low-rank pairs merged; but hf of a run with pairs is as in stage 1, with the pairs apart. Each has
    a model card with the licences of its bases. One tensor is in memory at a time. Raises RunError if `out` is not
    empty, or the run has no such checkpoint or no EMA.
    """
    require_new(out)
    slot = "ema" if ema else "master"
    reader = _checkpoint(run, step, slot)
    if slot not in reader.slots:
        raise RunError(f"{run}: has no EMA of its weights (recipe key ema), leave --ema out")
    recipe = load_recipe(run / "recipe.yaml", stored=True)
    with new_folder(out) as partial:
        write_weights(partial, run, reader, slot, recipe, layout, dtype)
        with_base = recipe.stage != "controlnet" and layout == "public"
        text = card(run, reader, slot, str(dtype).removeprefix("torch."), with_base)
        (partial / CARD).write_text(text, encoding="utf-8")
    return reader.step


def require_new(out: Path) -> None:
    """RunError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}, choose a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which is renamed to `out` when complete; leftovers of an interrupted export are
    overwritten. RunError if it cannot be written."""
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
            partial.replace(out)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
            raise


def write_weights(
    folder: Path, run: Path, reader: CheckpointReader, slot: str, recipe: Recipe, layout: Layout, dtype: torch.dtype
) -> None:
    """Write the weights `slot` of a run's checkpoint, with their config, into `folder`; see `export`. RunError if the
    layout has no place for them; nothing is written then."""
    require_layout(run, recipe, layout)
    pieces = {
        name: Piece(name, tuple(shape), dtype, lambda name=name: reader.full(slot, name))
        for name, shape in reader.shapes.items()
    }
    apart = layout == "hf" and recipe.controlnet.weights == "lora"
    if recipe.stage == "controlnet" and not apart:
        stage = open_controlnet(recipe, for_counting=recipe.controlnet.weights == "full")
        assert isinstance(stage.shape, ControlNetConfig)
        if stage.shape.lora:
            source = MergedControlNet(CheckpointWeights(reader, slot), stage.shape, stage.folder)
            pieces = {
                name: Piece(name, shape, dtype, lambda name=name: source.full(name))
                for name, shape in source.shapes.items()
            }
        _write_controlnet(folder, pieces, reader.buffers(slot))
        write_config(folder, stage.shape)
        return
    tensors = [*pieces.values(), *_buffers(reader.buffers(slot))]
    if layout == "public":
        tensors = _public(pieces, recipe.backbone, recipe.branch, recipe.data.image_size, dtype)
        recipe = recipe.model_copy(update={"branch": recipe.branch.model_copy(update=_FULL)})
    _write(folder, tensors)
    config = {"step": reader.step, "weights": slot, "recipe": recipe.model_dump(mode="json")}
    (folder / "config.json").write_text(redact(json.dumps(config, indent=2)))


def require_layout(run: Path, recipe: Recipe, layout: Layout) -> None:
    """RunError if `layout` has no place for what the run trained."""
    if recipe.stage == "controlnet":
        if (bridge := recipe.controlnet.bridge) != "latents_2d":
            raise RunError(
                f"{run}: controlnet.bridge is {bridge}, which a `flux_controlnet` folder has no place for: `bifrost"
                " generate` and `bifrost eval` read the run folder itself"
            )
    elif layout == "public" and recipe.branch.targets != "native":
        raise RunError(
            f"{run}: branch.targets is {recipe.branch.targets}, which the public layout has no place for: export with"
            " --format hf"
        )
    elif layout == "public" and recipe.branch.head == "flow":
        raise RunError(f"{run}: branch.head is flow, and the public layout has a linear head: export with --format hf")


def _public(
    pieces: dict[str, Piece], backbone: Backbone, branch: Branch, image_size: int, dtype: torch.dtype
) -> list[Piece]:
    """The trained `pieces` and the frozen base, under the public release's names. RunError if that has no place for
    this branch."""
    if branch.positions == "interleaved":
        raise RunError("branch.positions=interleaved: the public code has no such positions; export with --format hf")
    folder = locate(backbone.path, backbone.revision)
    config = read_config(folder)
    if len(branch_layers(config, branch.layers)) < config.text_config.num_hidden_layers:
        raise RunError(
            f"branch.layers={branch.layers}: the public layout has a copy of every layer; export with --format hf"
        )
    files = WeightFiles(folder)
    if branch.weights == "lora":
        pieces = merged(pieces, config, branch, backbone.weights, files, dtype)
    tensors = [piece._replace(name=public_name(name)) for name, piece in pieces.items()]
    tensors += _base(files, dtype, {tensor.name for tensor in tensors})
    if branch.positions == "mrope":
        # The public model always has the table; with mRoPE it is zero.
        shape = (1, grid_side(config, image_size) ** 2, pieces["head.bias"].shape[0])
        tensors.append(Piece("learnable_pos_emb", shape, dtype, lambda: torch.zeros(shape)))
    return tensors


def _write_controlnet(out: Path, pieces: dict[str, Piece], buffers: dict[str, torch.Tensor]) -> None:
    """Write diffusers' folder, which is also the public `flux_controlnet` layout. Statistics stay fp32."""
    tensors = [piece._replace(name=name.removeprefix("controlnet.")) for name, piece in pieces.items()]
    tensors += [piece._replace(name=piece.name.removeprefix("controlnet.")) for piece in _buffers(buffers)]
    _write(out, tensors, "diffusion_pytorch_model")


def _buffers(buffers: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(name, tuple(b.shape), b.dtype, lambda buffer=b: buffer) for name, b in buffers.items()]


def _checkpoint(run: Path, step: int | None, slot: str) -> CheckpointReader:
    """The run's checkpoint, with its `slot` verified if present."""
    store = Store(run / "checkpoints")
    if not store.root.is_dir():
        raise RunError(no_checkpoint(run))
    if step is None:
        reader = store.newest_verified(slots=(slot,))
        if reader is None:
            raise RunError(f"{run}: has no checkpoint that verifies")
        return reader
    problems = store.verify(store.require(step), slots=(slot,))
    if problems:
        raise RunError("; ".join(problems))
    return CheckpointReader(store.folder(step))


def _base(files: WeightFiles, dtype: torch.dtype, trained: Collection[str]) -> Iterator[Piece]:
    """The frozen base under the public names, from a hub folder of any version or an earlier export, without its
    `trained` part. Quantized weights are dequantized to `dtype`."""
    for name in files.names:
        public = public_base_name(name)
        if public in trained or is_trained(public):
            continue
        shape = files.shape(name)
        assert shape is not None
        yield Piece(public, shape, files.dtype(name) or dtype, lambda name=name: files.full(name))


def _write(out: Path, tensors: list[Piece], stem: str = "model") -> None:
    """Write files of at most SHARD_BYTES (or one larger tensor), and an index if there are several."""
    files: list[list[Piece]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.size for t in files[-1]) + tensor.size > SHARD_BYTES:
            files.append([])
        files[-1].append(tensor)
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = [f"{stem}.safetensors"]
    for name, part in zip(names, files, strict=True):
        write_file(out / name, {WHOLE: safetensors_parts(part)})
    if len(files) > 1:
        weight_map = {t.name: name for name, part in zip(names, files, strict=True) for t in part}
        index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": weight_map}
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
