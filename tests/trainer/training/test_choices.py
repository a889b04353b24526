"""Every sharding option trains like plain PyTorch, and moves the weights that it documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plain
import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.reader import CheckpointReader
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.layout import AS_SET, Zero
from bifrost.trainer.planner.traffic import traffic
from bifrost.trainer.training.batch import split_batch

Counts = dict[str, list[int]]

STEPS = 4
# Small enough for everything to be cut, and two passes a step.
SETTINGS = (
    f"steps={STEPS}",
    *runs.TINY,
    "backbone.placement=sharded",
    "micro_batch=1",
    "activation_checkpointing=true",
    "zero.persistence_threshold=0",
    "zero.prefetch_bucket=100000",
)
REPLICATED = "backbone.placement=replicated"
KEPT = "zero.persistence_threshold=1000000000"
CHOICES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "frozen whole": (REPLICATED,),
    "hpZ in two nodes": ("zero.hpz=2",),
    "overlap": ("zero.overlap_comm=true",),
    "few live": (REPLICATED, "zero.max_live_parameters=600000"),
    "kept gathered": (REPLICATED, KEPT),
    "all of it": (REPLICATED, "zero.hpz=2", "zero.overlap_comm=true", "zero.max_live_parameters=600000"),
}
# A small model's layers would be released between their recomputation and their backward pass, see `counted`.
STORED = "activation_checkpointing=false"
BRANCHES: dict[str, tuple[str, ...]] = {
    "low-rank pairs": ("branch.weights=lora", STORED),
    "low-rank pairs, few live": ("branch.weights=lora", STORED, "zero.max_live_parameters=600000"),
    "low-rank pairs, frozen whole": ("branch.weights=lora", REPLICATED),
    "fewer layers": ("branch.layers=2",),
}


def counted(arguments: list[str]) -> list[Counts]:
    """Train on this rank; of every step: kind of collective and ranks that take part -> calls, elements received."""
    import torch.distributed as dist

    from bifrost.trainer.training import run_context
    from bifrost.trainer.training.train import train

    steps: list[Counts] = [{}]

    def counting(name: str) -> None:
        function = getattr(dist, name)

        def call(output: Any = None, input: Any = None, *args: Any, **kwargs: Any) -> Any:
            output = kwargs.pop("output_tensor", kwargs.pop("output", output))
            input = kwargs.pop("input_tensor", kwargs.pop("input", input))
            size = dist.get_world_size(kwargs.get("group"))
            found = steps[-1].setdefault(f"{name} of {size}", [0, 0])
            found[0] += 1
            found[1] += max(output.numel(), input.numel()) * (size - 1) // size
            return function(output, input, *args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        counting(name)
    given = run_context.deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        found = given(*args)
        # A small model would stay gathered from the forward to the backward pass.
        found["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return found

    run_context.deepspeed_config = config
    train(load_recipe("tiny-mllm", arguments), after_step=lambda progress: steps.append({}))
    return steps[:-1]


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a choice -> its run's folder, and what the ranks counted."""
    done: dict[str, tuple[Path, list[Counts]]] = {}

    def train(name: str) -> tuple[Path, list[Counts]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("choice")
            settings = (*SETTINGS, *{**CHOICES, **BRANCHES}[name])
            ended = ranked.run(counted, 4, runs.arguments(shards, folder, *settings)[2:])
            assert [rank.code for rank in ended] == [0] * 4, ended[0].err
            done[name] = folder / "tiny-mllm", ended[0].value
        return done[name]

    return train


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(Store(run / "checkpoints").folder(STEPS))
    return {
        f"{slot} {name}": reader.read(slot, name, 0, int(np.prod(shape)))
        for slot in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in reader.shapes.items()
    }


@pytest.mark.multi
@pytest.mark.slow
def test_four_ranks_train_like_plain_pytorch(trained: Any, shards: Path, tmp_path: Path) -> None:
    wanted = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *SETTINGS)[2:]))
    assert len(wanted) == STEPS and wanted[-1] < 0.8 * wanted[0]
    np.testing.assert_allclose(runs.losses(trained("plain")[0]), wanted, rtol=1e-5)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHOICES)[1:])
def test_every_choice_trains_alike_to_the_bit(name: str, trained: Any) -> None:
    run, before = trained(name)[0], trained("plain")[0]
    assert runs.losses(run) == runs.losses(before)
    wanted = weights(before)
    for key, value in weights(run).items():
        assert torch.equal(value, wanted[key]), key


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHOICES, *BRANCHES])
def test_a_step_moves_what_the_plan_says(name: str, trained: Any, tmp_path: Path) -> None:
    *_, step = trained(name)[1]
    recipe = load_recipe("tiny-mllm", runs.arguments(tmp_path, tmp_path, *SETTINGS, *{**CHOICES, **BRANCHES}[name])[2:])
    planned: dict[str, list[float]] = {}
    for one in traffic(parts(recipe), Zero.of(recipe.precision, recipe.zero), AS_SET, gpus=4, node=2, passes=2):
        function = "reduce_scatter_tensor" if "reduce" in one.kind else "all_gather_into_tensor"
        sums = planned.setdefault(f"{function} of {one.ranks}", [0, 0.0])
        sums[0] += one.count
        sums[1] += one.bytes / 4
    assert step.keys() == planned.keys()
    for key, (count, elements) in planned.items():
        # What is fetched around the turn of a pass, and layers that are not computed whole, weigh in a model of four.
        assert step[key][1] == pytest.approx(elements, rel=0.08), key
        assert step[key][0] == pytest.approx(count, rel=0.35), key


@pytest.mark.multi
@pytest.mark.slow
def test_passes_of_a_step_gather_again_only_if_let(trained: Any) -> None:
    """Two passes: each gathers all that is cut, unless it stays gathered, and backward what was not kept for it."""
    gathered = {name: trained(name)[1][-1]["all_gather_into_tensor of 4"][1] for name in CHOICES}
    once = gathered["kept gathered"]
    assert gathered["frozen whole"] == pytest.approx(2 * once, rel=0.08)
    assert gathered["few live"] > 3 * once
    assert gathered["hpZ in two nodes"] == once


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_goes_on_with_other_choices(trained: Any, shards: Path, tmp_path: Path) -> None:
    for steps, choices in ((1, CHOICES["all of it"]), (2, ()), (STEPS, ("zero.hpz=2",))):
        settings = (*SETTINGS, *choices, f"steps={steps}")
        ended = ranked.bifrost(4, *runs.arguments(shards, tmp_path, *settings))
        assert [rank.code for rank in ended] == [0] * 4, ended[0].err
    assert runs.losses(tmp_path / "tiny-mllm") == runs.losses(trained("plain")[0])


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    with pytest.raises(RunError, match=r"zero\.hpz=4 needs a multiple of 4 ranks, got 6; set zero\.hpz=null"):
        split_batch(96, 1, 6, hpz=4)
    assert split_batch(96, 1, 8, hpz=4).passes == 12
    assert split_batch(96, 1, 2, hpz=4).passes == 48, "less than a node: nothing to copy"
