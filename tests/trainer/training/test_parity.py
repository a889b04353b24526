"""ZeRO-3 on 1, 2 and 4 ranks trains like plain single-process PyTorch, whatever the accumulation."""

from pathlib import Path

import numpy as np
import pytest

import plain
import ranked
import runs
from bifrost.recipes import load_recipe

STEPS = 5


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("branch.loss_tokens=all", "branch.positions=interleaved"),
        (
            "branch.loss_tokens=masked",
            "branch.positions=learned",
            "branch.draws=2",
            "activation_checkpointing=true",
            "optimizer.clip=0.5",
        ),
    ],
    ids=["all-interleaved", "masked-learned-draws"],
)
def test_ranks_equal_plain_pytorch(shards: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (f"steps={STEPS}", *runs.TINY, *settings)
    arguments = runs.arguments(shards, tmp_path, *settings)
    wanted = plain.losses(load_recipe("tiny-mllm", arguments[2:]))
    assert len(wanted) == STEPS and wanted[-1] < 0.8 * wanted[0]
    digests = set()
    for ranks in (1, 2, 4):
        ended = ranked.bifrost(ranks, *runs.arguments(shards, tmp_path / str(ranks), *settings))
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
        run = tmp_path / str(ranks) / "tiny-mllm"
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    assert len(digests) == 1, "another sequence of samples on another number of ranks"


@pytest.mark.multi
def test_the_fused_head_trains_like_the_reference(shards: Path, tmp_path: Path) -> None:
    """Triton's kernel, interpreted, under ZeRO-3 on two ranks: its weight is gathered for both passes."""
    losses = []
    for provider in ("reference", "triton"):
        settings = ("steps=5", "branch.loss_tokens=masked", f"kernels.head_backend={provider}")
        ended = ranked.bifrost(2, *runs.arguments(shards, tmp_path / provider, *settings))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        losses.append(runs.losses(tmp_path / provider / "tiny-mllm"))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
