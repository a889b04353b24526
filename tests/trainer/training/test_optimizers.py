"""Every optimizer trains on 1, 2 and 4 ranks like its library in one process of plain PyTorch, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plain
import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.optimizer import exchanges

pytestmark = [pytest.mark.multi, pytest.mark.slow]

STEPS = 20
OPTIMIZERS = {
    "lion": ("optimizer.name=lion", "optimizer.lr=5e-5", "optimizer.betas=[0.9, 0.99]", "optimizer.weight_decay=0.1"),
    "muon": ("optimizer.name=muon", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1"),
    "adamw-8bit": ("optimizer.name=adamw-8bit", "optimizer.lr=1e-3"),
}
# Clipped in every step; the parameters are those of several layers, and some slices on 4 ranks are padded.
SETTINGS = (f"steps={STEPS}", *runs.TINY, "optimizer.clip=0.5", "ema=null", "checkpoint.every=8")


def settings(name: str, *others: str) -> tuple[str, ...]:
    return (*SETTINGS, *OPTIMIZERS[name], *others)


def train(shards: Path, folder: Path, name: str, ranks: int, *others: str) -> Path:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, folder, *settings(name, *others)))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return folder / "tiny-mllm"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an optimizer's run on so many ranks."""
    done: dict[tuple[str, int], Path] = {}

    def run(name: str, ranks: int) -> Path:
        if (name, ranks) not in done:
            done[name, ranks] = train(shards, tmp_path_factory.mktemp("optimizer"), name, ranks)
        return done[name, ranks]

    return run


@pytest.fixture(scope="module")
def wanted(shards: Path) -> Any:
    """The losses of an optimizer's library."""
    done: dict[str, list[float]] = {}

    def losses(name: str) -> list[float]:
        if name not in done:
            done[name] = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, shards, *settings(name))[2:]))
            assert len(done[name]) == STEPS and done[name][-1] < 0.9 * done[name][0]
        return done[name]

    return losses


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_equal_the_library_in_one_process(name: str, ranks: int, trained: Any, wanted: Any) -> None:
    found = runs.losses(trained(name, ranks))
    print(name, ranks, np.abs(np.array(found) / wanted(name) - 1))
    np.testing.assert_allclose(found, wanted(name), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, trained: Any, shards: Path, tmp_path: Path) -> None:
    whole = trained(name, 2)
    shutil.copytree(whole, tmp_path / "tiny-mllm")
    run = tmp_path / "tiny-mllm"
    for step in (16, STEPS):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    train(shards, tmp_path, name, 2)
    assert [start["step"] for start in runs.events(run, "start")] == [0, 8]
    assert runs.losses(run) == runs.losses(whole)
    for rank in range(2):
        file = f"checkpoints/step-{STEPS:08d}/rank-{rank:05d}.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_on_other_numbers_of_ranks(name: str, shards: Path, tmp_path: Path, wanted: Any) -> None:
    for ranks, steps in ((1, 6), (2, 13), (4, STEPS)):
        run = train(shards, tmp_path, name, ranks, f"steps={steps}")
    assert [start["step"] for start in runs.events(run, "start")] == [0, 6, 13]
    np.testing.assert_allclose(runs.losses(run), wanted(name), rtol=1e-5)


def test_another_optimizer_is_refused(trained: Any, shards: Path) -> None:
    run = trained("lion", 1)
    ended = ranked.bifrost(1, *runs.arguments(shards, run.parent, *SETTINGS, "steps=30"))[0]
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert 'optimizer.name was "lion" in this run and is "adamw" now' in ended.err


def exchanged(arguments: list[str]) -> list[int]:
    """Train on this rank; of every step the exchanges of matrices, and the bytes that this rank receives in them."""
    import torch.distributed as dist

    from bifrost.trainer.training.train import train

    steps = [[0, 0]]
    function = dist.all_to_all_single

    def call(output: Any, *args: Any, **kwargs: Any) -> Any:
        steps[-1][0] += 1
        steps[-1][1] += output.nbytes
        return function(output, *args, **kwargs)

    dist.all_to_all_single = call
    train(load_recipe("tiny-mllm", arguments), after_step=lambda progress: steps.append([0, 0]))
    return steps[-2]


def test_muon_exchanges_what_the_plan_says(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, *settings("muon", "steps=2"))[2:]
    ended = ranked.run(exchanged, 4, arguments)
    assert [rank.code for rank in ended] == [0] * 4, ended[0].err
    (planned,) = exchanges(parts(load_recipe("tiny-mllm", arguments)), "muon", 4)
    for rank in ended:
        assert rank.value[0] == planned.count
        # A rank's own slices, which it keeps, are a quarter of what it receives.
        assert rank.value[1] * 3 / 4 == pytest.approx(planned.bytes, rel=0.05)
