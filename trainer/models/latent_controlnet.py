"""The latent ControlNet: a trainable copy of FLUX's first blocks, conditioned on patch latents.

diffusers' FLUX ControlNet, except that its condition is [B, N, D] patch latents, resampled to FLUX's token grid.
Names and folder layout are those of the public release's `flux_controlnet`.

Legend: B samples, N patch latents of width D, M packed FLUX tokens of C channels, L text tokens of width E, P pooled
text width, H FLUX's hidden width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from ..errors import RunError
from . import weights
from .config_files import read_json
from .controlnet_config import SHARED, ControlNetConfig, Resampling, is_shared
from .flux_blocks import use_own_blocks
from .flux_transformer import embed, run_block
from .low_rank import pair_init
from .low_rank_controlnet import adapt
from .resampler import DownsamplingBlock, UpsamplingBlock, on_grid

_BLOCKS: dict[Resampling, str] = {"up": "up_sampling_block", "down": "down_sampling_block"}
_PAIR = ("lora_A", "lora_B")
_ZERO = "controlnet_"
"""Name prefix of all zero-initialised tensors: the projections of the condition and of the residuals."""


class Residuals(NamedTuple):
    """Residuals that FLUX adds, [B, M, H] each, in order of the groups of double and of single blocks."""

    double: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


class LatentControlNet(FluxControlNetModel):
    """Residuals for FLUX from patch latents. `initialise` or `load` fills the weights after construction; `share`
    connects one with low-rank pairs with its FLUX.

    With `enable_gradient_checkpointing()` the backward pass recomputes every block.
    """

    def __init__(self, shape: ControlNetConfig) -> None:
        settings = {name: value for name, value in shape.public().items() if not name.startswith("_")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a moved import in diffusers itself
            super().__init__(**settings)
        self.shape = shape
        width = shape.latent_width
        self.controlnet_x_embedder = nn.Linear(width, self.inner_dim)
        if shape.resampling == "up":
            self.up_sampling_block = UpsamplingBlock(width, shape.norm)
        elif shape.resampling == "down":
            self.down_sampling_block = DownsamplingBlock(width, shape.norm)
        use_own_blocks(self)
        if shape.lora:
            adapt(self, shape.lora)

    def resample(self, latents: Tensor, columns: int | None = None) -> Tensor:
        """Patch latents [B, N, D] on FLUX's token grid, [B, M, D], which has `columns` tokens in a row; None for a
        square."""
        kind = self.shape.resampling
        if kind == "none":
            return latents
        if columns is not None:
            columns = columns // 2 if kind == "up" else columns * 2
        return on_grid(getattr(self, _BLOCKS[kind]), latents, columns)

    def forward(  # type: ignore[override]
        self,
        noisy: Tensor,
        patch_latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
        scale: float = 1.0,
        columns: int | None = None,
    ) -> Residuals:
        """Residuals for noisy packed latents [B, M, C] at timestep [B] in [0, 1], times `scale`.

        patch_latents [B, N, D], or fewer if each is of several noisy latents next to each other; text [B, L, E], pooled
        [B, P], img_ids [M, 3], txt_ids [L, 3]; guidance [B] for a FLUX that takes one, else None.
        columns: tokens in a row of the image, None for a square.
        """
        dtype = self.controlnet_x_embedder.weight.dtype
        condition = self.controlnet_x_embedder(self.resample(patch_latents.to(dtype), columns))
        if len(noisy) > len(condition):
            condition = condition.repeat_interleave(len(noisy) // len(condition), 0)
        rest = text.to(dtype), pooled.to(dtype), timestep, guidance, img_ids, txt_ids
        text, image, level, rotation = embed(self, self.x_embedder(noisy.to(dtype)) + condition, *rest)
        double, single = [], []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            text, image = run_block(self, block, text, image, level, rotation)
            double.append(project(image))
        hidden, tokens = torch.cat((text, image), dim=1), image.shape[1]
        blocks: Any = self.single_transformer_blocks
        for block, project in zip(blocks, self.controlnet_single_blocks, strict=True):
            last = {"image": tokens} if block is blocks[-1] else {}
            hidden = run_block(self, block, hidden, level, rotation, **last)
            single.append(project(hidden if last else hidden[:, -tokens:]))
        return Residuals(*(tuple(x if scale == 1 else x * scale for x in part) for part in (double, single)))

    def statistics(self) -> dict[str, Tensor]:
        """Name -> buffer that training updates in addition to the weights: BatchNorm's running statistics."""
        return dict(self.named_buffers())

    def copied_names(self) -> dict[str, str]:
        """Parameter -> FLUX transformer's parameter that initialises it."""
        names = (name for name, _ in self.named_parameters() if is_shared(name))
        return {name: name for name in names if not name.endswith(_PAIR)}

    def initialise(self, flux: weights.Source, where: object, seed: int) -> None:
        """Copy FLUX's first blocks and embeddings from `flux`, zero the projections, initialise the rest as torch does.

        flux: a FLUX transformer's weights under their own names; `where` names them in errors.
        """
        parameters = dict(self.named_parameters())
        copied = self.copied_names()
        weights.fill({theirs: parameters.pop(ours) for ours, theirs in copied.items()}, flux, where)
        pairs = {name: parameters.pop(name) for name in list(parameters) if name.endswith(_PAIR)}
        drawn = {n: pair_init(n, weights.full_shape(p)) for n, p in pairs.items()}
        weights.fill(pairs, weights.RandomInit(seed, drawn), "initial weights")
        zero = {name: parameters.pop(name) for name in list(parameters) if name.startswith(_ZERO)}
        weights.fill(zero, _Constants({n: (weights.full_shape(p), 0.0) for n, p in zero.items()}), "zeros")
        norms = {name: parameters.pop(name) for name in list(parameters) if name.split(".")[1].startswith("bn")}
        ones = {n: (weights.full_shape(p), float(n.endswith("weight"))) for n, p in norms.items()}
        weights.fill(norms, _Constants(ones), "norms")
        fans = {n.rpartition(".")[0]: weights.full_shape(p) for n, p in parameters.items() if n.endswith("weight")}
        drawn = {n: _as_torch(weights.full_shape(p), fans[n.rpartition(".")[0]]) for n, p in parameters.items()}
        weights.fill(parameters, weights.RandomInit(seed, drawn), "initial weights")

    def load(self, source: weights.Source, where: object) -> None:
        """Load all weights and running statistics from a ControlNet in the public layout."""
        tensors: dict[str, Any] = {**dict(self.named_parameters()), **self.statistics()}
        weights.fill(tensors, source, where)


def _as_torch(shape: tuple[int, ...], weight: tuple[int, ...]) -> weights.Distribution:
    """torch's initialisation of a convolution: uniform in +-1 / sqrt(fan in), with the fan in counted on axis 1."""
    return weights.Distribution(shape, "uniform", (weight[1] * weight[2] * weight[3]) ** -0.5)


class _Constants:
    """A source of constant weights: name -> (shape, value)."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name][0] if name in self.tensors else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return torch.full((hi - lo,), self.tensors[name][1])


def read_config(folder: Path) -> tuple[ControlNetConfig, weights.WeightFiles]:
    """Shape and weights of a `flux_controlnet` folder; RunError for any other folder."""
    file = folder / "config.json"
    if not file.is_file():
        lacks = "no config.json" if folder.is_dir() else "no such folder"
        raise RunError(f"{folder}: {lacks}; give a folder with a FLUX ControlNet, such as `flux_controlnet`")
    settings = read_json(file)
    if settings.get("_class_name") != "FluxControlNetModel":
        raise RunError(f"{file}: _class_name is {settings.get('_class_name')}, expected FluxControlNetModel")
    for name in ("num_mode", "conditioning_embedding_channels"):
        if settings.get(name) is not None:
            raise RunError(f"{file}: {name} is {settings[name]}; a latent ControlNet has none")
    files = weights.WeightFiles(folder)
    projection = files.shape("controlnet_x_embedder.weight")
    if projection is None:
        raise RunError(f"{folder}: controlnet_x_embedder.weight is missing; is it complete?")
    prefixes: list[Resampling] = [kind for kind, name in _BLOCKS.items() if files.shape(f"{name}.conv.weight")]
    kind: Resampling = prefixes[0] if prefixes else "none"
    batch = kind == "none" or files.shape(f"{_BLOCKS[kind]}.bn1.running_mean") is not None
    if missing := [name for name in ("num_layers", "num_single_layers", *SHARED) if name not in settings]:
        raise RunError(f"{file}: {', '.join(missing)} missing; fetch it again")
    double, single = settings["num_layers"], settings["num_single_layers"]
    shared = {name: settings[name] for name in SHARED}
    return ControlNetConfig(shared, projection[1], kind, double, single, "batch" if batch else "group"), files


def write_config(folder: Path, config: ControlNetConfig) -> None:
    """Write `config.json` of a `flux_controlnet` folder; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.public(), indent=2) + "\n")
