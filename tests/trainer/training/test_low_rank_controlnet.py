"""Training of a ControlNet with low-rank pairs under ZeRO-3: parity with plain PyTorch, resumes, export, inference."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plain
import ranked
import runs
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.state import restore_statistics
from bifrost.trainer.inference.stored_controlnet import load_controlnet
from bifrost.trainer.inference.stored_runs import checkpoint_weights
from bifrost.trainer.models.flux import FluxFolder, image_ids
from bifrost.trainer.models.latent_controlnet import LatentControlNet, read_config
from bifrost.trainer.models.weights import WeightFiles, fill

pytestmark = [pytest.mark.multi, pytest.mark.slow]

LORA = ("controlnet.weights=lora", "controlnet.lora={rank: 3, alpha: 6}", "controlnet.double=2", "optimizer.lr=1e-2")
SHARDED = ("flux.placement.transformer=sharded", "zero.persistence_threshold=0")
REPLICATED = ("flux.placement.transformer=replicated",)


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


def arguments(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    whole = (*runs.TINY, f"flux.path={flux}", f"micro_batch={8 // ranks}", *LORA, *settings)
    return runs.arguments(shards, runs_dir, *whole, recipe="tiny-controlnet")


def train(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(shards, flux, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-controlnet"


@pytest.mark.parametrize(
    "settings",
    [
        (*SHARDED, "flux.draws=2"),
        (*REPLICATED, "activation_checkpointing=true", "controlnet.lora.targets=[attention, mlp]"),
        (*SHARDED, "flux.weights=int8", "controlnet.norm=group"),
    ],
    ids=["sharded", "replicated", "int8"],
)
def test_ranks_equal_plain_pytorch(shards: Path, flux: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = ("steps=4", *settings)
    wanted = plain.losses(load_recipe("tiny-controlnet", arguments(shards, flux, tmp_path, 1, *settings)[2:]))
    for ranks in (1, 2, 4):
        run = train(shards, flux, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)


def test_resumes_to_the_bit_and_on_other_ranks(shards: Path, flux: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.every=3", "ema.decay=0.9", *SHARDED)
    run = train(shards, flux, tmp_path, 2, "steps=6", *settings)
    undisturbed, last = runs.losses(run), run / "checkpoints/step-00000006"
    before = (last / "rank-00001.safetensors").read_bytes()
    shutil.rmtree(last)
    train(shards, flux, tmp_path, 2, "steps=6", *settings)
    assert runs.losses(run) == undisturbed
    assert (last / "rank-00001.safetensors").read_bytes() == before
    for ranks, steps in ((2, 2), (1, 4), (4, 6)):
        parts = train(shards, flux, tmp_path / "parts", ranks, f"steps={steps}", *settings)
    np.testing.assert_allclose(runs.losses(parts), undisturbed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("held", "norm"), [("bf16", "batch"), ("int8", "group")])
def test_an_export_is_an_ordinary_controlnet_with_the_same_results(
    shards: Path, flux: Path, tmp_path: Path, held: str, norm: str
) -> None:
    """The residuals of the trained model, with its pairs apart, of the run as inference reads it, of the folder, and of
    the export of the pairs, from which a run begins like from this one."""
    settings = (f"flux.weights={held}", f"controlnet.norm={norm}", "ema=null")
    run = train(shards, flux, tmp_path, 2, "steps=4", *settings, *SHARDED)
    out = tmp_path / "flux_controlnet"
    export(run, out, "public", dtype=torch.float32)
    shape, files = read_config(out)
    assert shape.lora is None
    with torch.device("meta"):
        assert files.names == sorted(LatentControlNet(shape).state_dict()), "the parameters of a full ControlNet"

    recipe = load_recipe("tiny-controlnet", arguments(shards, flux, tmp_path, 1, *settings)[2:])
    inputs, model = plain.loaded(recipe)
    before = residuals(model.controlnet, inputs.stage.folder)
    assert not any(each.any() for each in before), "no effect before training"
    weights = checkpoint_weights(run)
    fill(trained := model.trainable(), weights, run)
    restore_statistics(model.statistics(), weights.reader, weights.slot)
    where = 192, 4, torch.device("cpu"), torch.float32
    pairs = tmp_path / "pairs"
    export(run, pairs, "hf", dtype=torch.float32)
    assert WeightFiles(pairs).names == sorted([*trained, *model.statistics()])
    loaded = [load_controlnet(path, named, *where) for path, named in ((run, None), (out, str(flux)), (pairs, None))]
    networks = [model.controlnet, *(each.network for each in loaded)]
    apart, *others = (residuals(network, inputs.stage.folder) for network in networks)
    for one, merged, exported, from_pairs in zip(apart, *others, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(merged, one, rtol=0, atol=1e-5)
        assert torch.equal(merged, exported) and torch.equal(merged, from_pairs)

    begun = {}
    for start, code, message in ((run, 0, ""), (pairs, 0, ""), (out, 2, "has no low-rank pairs; give a run")):
        again = (*settings, f"name=from-{start.name}", f"init_from={start}", "steps=1")
        (ended,) = ranked.bifrost(1, *arguments(shards, flux, tmp_path, 1, *again))
        assert ended.code == code and message in ended.err, ended.err
        begun[start] = runs.losses(tmp_path / f"from-{start.name}") if code == 0 else []
    assert begun[run] == begun[pairs] != []
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, tmp_path, 2, *settings, "steps=5", "controlnet.lora.rank=4"))
    assert ended.code == 2 and "controlnet.lora" in ended.err, "the pairs of a run stay"


@torch.no_grad()
def residuals(network: Any, folder: FluxFolder) -> list[torch.Tensor]:
    """Of two random inputs."""
    draw = torch.Generator().manual_seed(3)
    side = folder.grid(64)
    shapes = (2, side**2, folder.transformer["in_channels"]), (2, 16, 192), (2, 13, 12), (2, 8)
    noisy, latents, text, pooled = (torch.randn(shape, generator=draw) for shape in shapes)
    levels = torch.tensor([0.3, 0.8]), torch.full((2,), 3.5)
    found = network.eval()(noisy, latents, text, pooled, *levels, image_ids(2 * side, 2 * side), torch.zeros(13, 3))
    return [*found.double, *found.single]
