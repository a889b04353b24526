"""Exports: the public layout loads where the public checkpoint does, to the bit; memory is a few tensors'."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import bifrost
import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import _base, _public, export
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles, is_trained, public_name


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    arguments = runs.arguments(shards, folder, "steps=3", "ema.decay=0.5", "branch.positions=learned", *runs.TINY)
    assert ranked.bifrost(2, *arguments)[0].code == 0
    return folder / "tiny-mllm"


def test_public_layout_is_complete_and_exact(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "public", dtype=torch.float32) == 3
    exported = load_file(tmp_path / "out" / "model.safetensors")
    reader = Store(run / "checkpoints").newest_verified()
    assert reader is not None
    for name in reader.shapes:
        assert torch.equal(exported.pop(public_name(name)), reader.full("master", name))
    base = load_file(locate("builtin:tiny") / "model.safetensors")
    assert exported.keys() == {f"vision_language_model.{name}" for name in base}
    assert all(torch.equal(exported[f"vision_language_model.{name}"], base[name]) for name in base)


@pytest.mark.parametrize("layout", ["public", "hf"])
def test_the_model_card_is_of_this_run(run: Path, tmp_path: Path, layout: Literal["public", "hf"]) -> None:
    """tests/trainer/checkpoint/test_model_card.py has the licences of other bases."""
    export(run, tmp_path / "out", layout)
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.license == "cc-by-sa-4.0"
    versions = json.loads((run / "environment.json").read_text())["versions"]
    assert versions["bifrost-train"] == bifrost.__version__
    assert f"torch {versions['torch']}" in found.text and f"bifrost {bifrost.__version__}" in found.text
    assert f"`{runs.steps(run)[-1]['data_digest']}`" in found.text
    assert "| step | 3 |" in found.text and "| samples | 24 |" in found.text
    assert ("contain weights of" in found.text) == (layout == "public")


def test_average_and_bf16(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "hf", ema=True)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    reader = Store(run / "checkpoints").newest_verified()
    assert reader is not None
    assert exported.keys() == reader.shapes.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, reader.full("ema", name).bfloat16())
    assert not torch.equal(exported["head.weight"], reader.full("master", "head.weight").bfloat16())


@pytest.mark.parametrize("layout", ["public", "hf"])
def test_init_from_takes_up_where_the_export_stands(run: Path, shards: Path, tmp_path: Path, layout: str) -> None:
    """The first loss from an export equals that of a run that starts from the run folder itself."""
    export(run, tmp_path / "out", layout, dtype=torch.float32)
    losses = []
    for number, source in enumerate((tmp_path / "out", run)):
        settings = ("steps=1", "branch.positions=learned", f"init_from={source}", f"name=from-{number}", *runs.TINY)
        assert ranked.bifrost(1, *runs.arguments(shards, tmp_path, *settings))[0].code == 0
        losses += runs.losses(tmp_path / f"from-{number}")
    assert losses[0] == losses[1]
    assert losses[0] != runs.losses(run)[0]


def test_files_are_split_and_indexed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bifrost.trainer.checkpoint.export.SHARD_BYTES", 1_000_000)
    export(run, tmp_path / "out", "public")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 1_300_000 for file in files)
    whole = WeightFiles(tmp_path / "out")
    assert whole.shape("vision_head.weight") == (192, 192)
    assert whole.full("mask_token").shape == (1, 1, 192)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint of step 2; it has steps 3"):
        export(run, tmp_path / "out", "public", step=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(RunError, match="not empty"):
        export(run, tmp_path / "full", "public")
    with pytest.raises(RunError, match="nothing: no such run folder"):
        export(tmp_path / "nothing", tmp_path / "out", "public")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"x/out: cannot be written"):
        export(run, tmp_path / "full" / "x" / "out", "hf")


def test_an_export_that_is_cut_short_is_written_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle: nothing is there under the folder's name, and the same command does it all."""

    def interrupted(path: Path, parts: object) -> None:
        path.write_bytes(b"half")
        raise SystemExit(130)

    with monkeypatch.context() as patch:
        patch.setattr("bifrost.trainer.checkpoint.export.write_file", interrupted)
        with pytest.raises(SystemExit):
            export(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()

    def full(path: Path, parts: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("bifrost.trainer.checkpoint.export.write_file", full)
        with pytest.raises(RunError, match=r"out: cannot be written \(No space left on device\)"):
            export(run, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == [], "what was written is removed, since the disk is full"
    assert export(run, tmp_path / "out", "hf") == export(run, tmp_path / "whole", "hf")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert contents[0] == contents[1] and {p.name for p in tmp_path.iterdir()} == {"out", "whole"}
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        export(run, tmp_path / "file", "hf")


def test_memory_is_a_few_tensors(run: Path, tmp_path: Path) -> None:
    """Forty tensors of 8 MB: the export's own memory, a block of 16 MB for hashing included, stays below seven."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    tensors = {f"t{number:02d}": torch.randn(2_000_000) for number in range(40)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    state = {"recipe": load_recipe(run / "recipe.yaml").model_dump(mode="json")}
    Store(tmp_path / "run" / "checkpoints").save(1, Payload(0, 1, {"master": tensors}, shapes, state, {}))
    tensors.clear()
    export(tmp_path / "run", tmp_path / "first", "hf", dtype=torch.float32)  # imports are no memory of an export
    before = own_memory()
    peaks = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export(tmp_path / "run", tmp_path / "out", "hf", dtype=torch.float32)
    done.set()
    watcher.join()
    assert len(peaks) > 10
    assert max(peaks) - before < 56_000_000


def own_memory() -> int:
    """Bytes of this process that no file backs: mapped files come and go with the page cache."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def test_a_base_in_the_public_layout_keeps_its_names(run: Path, tmp_path: Path) -> None:
    """The backbone of an earlier export, or of the public release: its names are public already, its branch is old."""
    export(run, tmp_path / "first", "public", dtype=torch.float32)
    base = tmp_path / "base"
    shutil.copytree(locate("builtin:tiny"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    stale = {name: torch.zeros_like(t) if is_trained(name) else t for name, t in tensors.items()}
    save_file(stale, base / "model.safetensors")
    again = tmp_path / "run"
    again.mkdir()
    (again / "checkpoints").symlink_to(run / "checkpoints")
    recipe = (run / "recipe.yaml").read_text()
    assert recipe.count("builtin:tiny") == 1
    (again / "recipe.yaml").write_text(recipe.replace("builtin:tiny", str(base)))
    export(again, tmp_path / "out", "public", dtype=torch.float32)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_a_quantized_base_is_exported_as_plain_weights(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "fixtures" / "quantized" / "bitsandbytes-int8"
    expected = load_file(folder / "expected.safetensors")
    pieces = list(_base(WeightFiles(folder), torch.bfloat16, set()))
    assert {piece.name for piece in pieces} == {f"vision_language_model.{name}" for name in expected}
    for piece in pieces:
        assert piece.dtype == torch.bfloat16
        wanted = expected[piece.name.removeprefix("vision_language_model.")]
        assert torch.equal(piece.read().to(piece.dtype), wanted)


def test_positions_that_the_public_code_lacks_are_refused_in_its_layout() -> None:
    recipe = load_recipe("tiny-mllm", ["branch.positions=interleaved"])
    with pytest.raises(RunError, match=r"^branch\.positions=interleaved: .*--format hf$"):
        _public({}, recipe.backbone, recipe.branch, recipe.data.image_size, torch.float32)
