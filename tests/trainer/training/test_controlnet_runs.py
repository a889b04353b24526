"""Stage 2 trains like stage 1: as plain PyTorch on any number of ranks, and a resumed run equals an unbroken one.

BatchNorm's statistics cover one pass on all ranks, so the runs compared here have equally many samples per pass.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import plain
import ranked
import runs
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.models.latent_controlnet import read_config

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


def arguments(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    whole = (*runs.TINY, f"flux.path={flux}", f"micro_batch={8 // ranks}", "optimizer.lr=3e-3", *settings)
    return runs.arguments(shards, runs_dir, *whole, recipe="tiny-controlnet")


def train(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(shards, flux, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-controlnet"


QUERIES = ("controlnet.bridge=queries", "controlnet.connector={queries: 5, layers: 2}")
CROSS_ATTENTION = ("controlnet.bridge=cross_attention",)


@pytest.mark.parametrize(
    "settings",
    [
        ("controlnet.norm=batch", "activation_checkpointing=false", "flux.draws=2"),
        ("controlnet.norm=group", "activation_checkpointing=true", "controlnet.double=2", "flux.text_tokens=7"),
        (*QUERIES, "activation_checkpointing=false", "flux.draws=2"),
        (*CROSS_ATTENTION, "activation_checkpointing=true"),
    ],
    ids=["batch-draws", "group-recomputed", "queries-draws", "cross-attention-recomputed"],
)
def test_ranks_equal_plain_pytorch(shards: Path, flux: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = ("steps=5", *settings)
    wanted = plain.losses(load_recipe("tiny-controlnet", arguments(shards, flux, tmp_path, 1, *settings)[2:]))
    digests = set()
    for ranks in (1, 2, 4):
        run = train(shards, flux, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    assert len(digests) == 1, "another sequence of samples on another number of ranks"


@pytest.mark.parametrize(
    ("precision", "more"),
    [("fp32", ()), ("bf16", ("flux.draws=2",)), ("bf16", QUERIES), ("bf16", CROSS_ATTENTION)],
    ids=["fp32", "bf16-draws", "queries", "cross-attention"],
)
def test_same_ranks_to_the_bit(shards: Path, flux: Path, tmp_path: Path, precision: str, more: tuple[str, ...]) -> None:
    settings = (f"precision={precision}", *more, "steps=6", "checkpoint.every=3", "ema.decay=0.9")
    run = train(shards, flux, tmp_path, 2, *settings)
    undisturbed = runs.losses(run)
    last = run / "checkpoints/step-00000006"
    before = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    batch_norm = more not in (QUERIES, CROSS_ATTENTION)
    assert ("buffers.safetensors" in before) == batch_norm, "BatchNorm's statistics are state"
    shutil.rmtree(last)
    train(shards, flux, tmp_path, 2, *settings)
    assert runs.losses(run) == undisturbed
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == before


def test_any_number_of_ranks(shards: Path, flux: Path, tmp_path: Path) -> None:
    whole = train(shards, flux, tmp_path / "whole", 2, "steps=8")
    for ranks, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        parts = train(shards, flux, tmp_path / "parts", ranks, f"steps={steps}")
    np.testing.assert_allclose(runs.losses(parts), runs.losses(whole), rtol=0, atol=1e-5)
    one, other = (Store(run / "checkpoints").newest_verified().buffers() for run in (whole, parts))
    for name, buffer in one.items():
        # A value within rounding of a ReLU's kink moves its whole channel; no other channel may differ.
        differs = ~torch.isclose(other[name], buffer, atol=1e-5, rtol=1e-5)
        assert differs.sum() <= 2 and torch.allclose(other[name], buffer, atol=1e-3), name
    assert any(buffer.std() > 0.01 for name, buffer in one.items() if name.endswith("running_mean")), "never moved"


def test_batch_statistics_depend_on_micro_batch_times_ranks_alone(shards: Path, flux: Path, tmp_path: Path) -> None:
    """What stage 2 promises: however 8 samples are divided, the same training; with 4 at a time another, said once."""
    whole = train(shards, flux, tmp_path / "whole", 1, "steps=4")
    begun = train(shards, flux, tmp_path / "begun", 1, "steps=2")
    other = Path(shutil.copytree(begun, tmp_path / "other" / "tiny-controlnet")).parent
    word = "statistics now cover 4 samples (micro_batch x ranks), 8 before"
    (ended, *_) = ranked.bifrost(2, *arguments(shards, flux, begun.parent, 2, "steps=4"))
    assert ended.code == 0 and "statistics now" not in ended.out
    np.testing.assert_allclose(runs.losses(begun), runs.losses(whole), rtol=0, atol=1e-5)
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, other, 2, "steps=4"))
    assert ended.code == 0 and ended.out.count(word) == 1
    apart = np.abs(np.subtract(runs.losses(other / "tiny-controlnet"), runs.losses(whole)))
    assert apart[:2].max() < 1e-5 and apart[3] > 1e-5, "more with every step: a ControlNet begins with zeros"
    group = "controlnet.norm=group"
    train(shards, flux, tmp_path / "group", 1, "steps=1", group)
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, tmp_path / "group", 2, "steps=2", group))
    assert ended.code == 0 and "statistics now" not in ended.out


def test_export_is_the_public_folder_and_starts_another_run(shards: Path, flux: Path, tmp_path: Path) -> None:
    run = train(shards, flux, tmp_path, 2, "steps=2")
    out = tmp_path / "flux_controlnet"
    assert export(run, out, "public", dtype=torch.float32) == 2
    shape, files = read_config(out)
    assert "latent ControlNet" in (out / "README.md").read_text()
    reader = Store(run / "checkpoints").newest_verified()
    saved = {name: reader.full("master", name) for name in reader.shapes} | reader.buffers()
    assert {f"controlnet.{name}" for name in files.names} == saved.keys()
    assert all(torch.equal(files.full(name), saved[f"controlnet.{name}"]) for name in files.names)
    assert (shape.double, shape.single, shape.norm, shape.resampling) == (1, 1, "batch", "up")
    begun = train(shards, flux, tmp_path / "second", 2, f"init_from={out}", "steps=1")
    assert runs.losses(begun)[0] != runs.losses(run)[0], "the same samples and noise, but no longer FLUX alone"


def refused(shards: Path, flux: Path, runs_dir: Path, *settings: str) -> str:
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, runs_dir, 1, *settings))
    assert ended.code == 2, ended.err
    (line,) = ended.err.strip().splitlines()
    return line


def test_wrong_inputs_are_one_line(shards: Path, flux: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(flux, tmp_path / "flux"))
    shutil.rmtree(half / "vae")
    assert "vae/config.json" in refused(shards, half, tmp_path, "steps=1")
    assert "flux.path=nowhere" in refused(shards, Path("nowhere"), tmp_path, "steps=1")
    line = refused(shards, flux, tmp_path, "steps=1", "flux.image_size=60")
    assert "flux.image_size=60: does not fit" in line and "multiple of 8" in line
    assert "4 x 4" in refused(shards, flux, tmp_path, "steps=1", "flux.image_size=96")
    assert "this FLUX has 2" in refused(shards, flux, tmp_path, "steps=1", "controlnet.double=3")
    assert "flux.path" in refused(shards, flux, tmp_path, "steps=1", "flux=null")
    assert not (tmp_path / "tiny-controlnet").exists()


def test_a_run_does_not_continue_with_another_flux_or_other_draws(shards: Path, flux: Path, tmp_path: Path) -> None:
    train(shards, flux, tmp_path, 1, "steps=1")
    other = tiny_flux.save(tiny_flux.pipeline(seed=1), tmp_path / "other")
    line = refused(shards, other, tmp_path, "steps=2")
    assert "content hash" in line
    assert "flux.text_tokens" in refused(shards, flux, tmp_path, "steps=2", "flux.text_tokens=7")
    line = refused(shards, flux, tmp_path, "steps=2", "flux.draws=2")
    assert "flux.draws was 1 in this run and is 2 now" in line
