"""Training of low-rank pairs under ZeRO-3: parity with plain PyTorch, resumes, the plan's bytes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plain
import ranked
import runs
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.inference.masked_decoding import decode, draw_orders, reveal_counts
from bifrost.trainer.inference.mllm import load_mllm
from bifrost.trainer.inference.stored_runs import stored_recipe
from bifrost.trainer.stages import open_patch_latents

pytestmark = [pytest.mark.multi, pytest.mark.slow]

LORA = (*runs.TINY, "branch.weights=lora", "branch.lora.rank=4", "optimizer.lr=1e-2", "branch.positions=learned")
FLOW = "branch={head: flow, flow_head: {layers: 1, draws: 2}}"
SHARDED, REPLICATED = ("backbone.placement=sharded", "zero.persistence_threshold=0"), ("backbone.placement=replicated",)


def train(shards: Path, folder: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, folder, *LORA, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return folder / "tiny-mllm"


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (SHARDED, ("branch.draws=2", "activation_checkpointing=true", "branch.layers=3")),
        (REPLICATED, ("branch.loss_tokens=masked", "branch.lora.targets=[q_proj, v_proj, down_proj]")),
        (SHARDED, ("backbone.weights=int8",)),
        (REPLICATED, (FLOW, "branch.layers=2", "activation_checkpointing=true", "optimizer.lr=3e-3")),
    ],
    ids=["sharded", "replicated", "int8", "flow"],
)
def test_ranks_equal_plain_pytorch(
    shards: Path, tmp_path: Path, settings: tuple[str, ...], others: tuple[str, ...]
) -> None:
    settings = ("steps=5", *settings, *others)
    wanted = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *LORA, *settings)[2:]))
    assert abs(wanted[-1] - wanted[0]) > 0.05 * wanted[0], "trained weights matter"
    for ranks in (1, 2, 4):
        run = train(shards, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)


def test_resumes_to_the_bit_and_on_other_ranks(shards: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.every=4", "ema.decay=0.9", *SHARDED)
    run = train(shards, tmp_path, 2, "steps=8", *settings)
    undisturbed = runs.steps(run)
    last = run / "checkpoints/step-00000008"
    before = (last / "rank-00001.safetensors").read_bytes()
    shutil.rmtree(last)
    train(shards, tmp_path, 2, "steps=8", *settings)
    exact = ("loss", "loss_masked", "grad_norm", "lr", "samples", "data_digest")
    assert [[line[key] for key in exact] for line in runs.steps(run)] == [
        [line[key] for key in exact] for line in undisturbed
    ]
    assert (last / "rank-00001.safetensors").read_bytes() == before

    for ranks, steps in ((2, 3), (1, 5), (4, 8)):
        parts = train(shards, tmp_path / "parts", ranks, f"steps={steps}", *settings)
    np.testing.assert_allclose(runs.losses(parts), [line["loss"] for line in undisturbed], rtol=0, atol=1e-5)


@pytest.mark.parametrize("held", ["bf16", "int8"])
def test_merged_and_apart_generate_the_same(shards: Path, tmp_path: Path, held: str) -> None:
    run = train(shards, tmp_path, 2, "steps=4", "ema=null", f"backbone.weights={held}")
    export(run, tmp_path / "merged", "public", dtype=torch.float32)
    export(run, tmp_path / "apart", "hf", dtype=torch.float32)
    found = [latents(folder) for folder in (run, tmp_path / "merged", tmp_path / "apart")]
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    untrained = latents(train(shards, tmp_path / "first", 1, "steps=1", "ema=null", "optimizer.lr=1e-9"))
    assert (untrained - found[0]).abs().max() > 0.01
    ended = ranked.bifrost(
        1, *runs.arguments(shards, tmp_path / "next", *LORA, f"init_from={tmp_path}/apart", "steps=1")
    )
    assert ended[0].code == 0, ended[0].err
    ended = ranked.bifrost(
        1, *runs.arguments(shards, tmp_path / "no", *LORA, f"init_from={tmp_path}/merged", "steps=1")
    )
    assert ended[0].code == 2 and "the public layout has no low-rank pairs; give a run" in ended[0].err, ended[0].err


def latents(path: Path) -> torch.Tensor:
    """Patch latents that the model at `path` decodes for a prompt."""
    stage = open_patch_latents(stored_recipe(path, "patch-latents"))
    model: Any = load_mllm(path, stage, torch.device("cpu"), torch.float32)
    prefix = model.backbone.prefix(torch.arange(20, 32), PrefixLayout.of([12], 16))
    return decode(model.branch, model.head, prefix, draw_orders([0], 16), reveal_counts(16, 4))
