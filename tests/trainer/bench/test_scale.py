"""`bifrost bench scale`: what it measures on real ranks, how points become curves, and what a simulation notices."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ranked
import runs
from bifrost.recipes import BatchSplit, load_recipe
from bifrost.trainer.bench import scale, simulate, simulated_data
from bifrost.trainer.bench.collectives import Clock
from bifrost.trainer.cli.main import app
from bifrost.trainer.cli.options import counts
from bifrost.trainer.errors import RunError
from bifrost.trainer.planner.parameters import Parameters

KNOWN_7B = {"trained": 6_539_391_488, "frozen": 7_747_169_280}  # docs/plan.md, counted by hand


def lines(*step_s: float) -> list[dict]:
    """Metric lines of steps from 1 on, an event among them."""
    made: list[dict] = [{"event": "start", "step": 0}]
    for number, seconds in enumerate(step_s, 1):
        made.append(
            {
                "step": number,
                "step_s": seconds,
                "data_wait_s": 0.1 * seconds,
                "rank_work_s_max": 3.0,
                "rank_work_s_median": 2.0,
            }
        )
    return made


def test_a_point_leaves_out_the_warm_up() -> None:
    recipe = load_recipe("tiny-mllm", ["global_batch=32", "micro_batch=4"])
    ranks = [("here", [0, 1], spent) for spent in (2.0, 6.0, 2.0, 2.0)]
    found = scale.point(recipe.name, recipe.split(4), "strong", ranks, lines(100, 100, 2, 4, 2))
    assert (found["steps"], found["step_s"], found["samples_per_s"], found["passes"]) == (3, 2, 16, 2)
    assert found["communication_share"] == pytest.approx(3 / 8)
    assert (found["communication_share_least"], found["communication_share_most"]) == (2 / 8, 6 / 8)
    assert found["data_wait_share"] == pytest.approx(0.1) and found["straggler"] == 1.5


def test_efficiency_is_throughput_per_core(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-mllm", ["global_batch=32", "micro_batch=4"])
    for ranks, step_s in ((1, 4.0), (2, 2.5), (8, 5.0)):
        one = scale.point(
            recipe.name, recipe.split(ranks), "strong", [("here", [4, 5], 0.0)] * ranks, lines(9, 9, step_s)
        )
        (tmp_path / f"strong-{ranks:04d}.json").write_text(json.dumps(one))
    (tmp_path / "simulated-512.json").write_text("{}")
    (points,) = scale.read_points(tmp_path).values()
    # 8, 12.8 and 6.4 samples/s on one core, two, and two for eight ranks.
    assert [one["efficiency"] for one in points] == pytest.approx([1, 0.8, 0.4])
    scale.present(tmp_path)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "weak-0001.json").write_text(json.dumps(points[0] | {"recipe": "other"}))
    with pytest.raises(RunError, match="contains points of other, tiny-mllm"):
        scale.read_points(tmp_path)


def test_cores_are_counted_once_a_host() -> None:
    def ranks(*each: tuple[str, list[int]]) -> int:
        return scale.cores_in_use([(host, own, 0.0) for host, own in each])

    assert ranks(("a", [0, 1])) == 1, "a rank is one thread"
    assert ranks(*[("a", [0, 1])] * 3) == 2
    assert ranks(("a", [0]), ("a", [1]), ("b", [0]), ("b", [1])) == 4, "as Slurm binds tasks"


def test_batches_of_weak_and_strong_scaling() -> None:
    weak, strong = (scale.split(mode, 48, 8, 4) for mode in scale.MODES)
    assert (weak.global_batch, weak.micro_batch, weak.passes) == (32, 8, 1)
    assert (strong.global_batch, strong.micro_batch, strong.passes) == (48, 6, 2)
    for wrong in ("0,2", "two", ""):
        with pytest.raises(RunError, match="--ranks"):
            counts("--ranks", wrong)


def collectives_of_a_slow_rank() -> list[float]:
    """Rank 1 comes half a second late to each of three collectives: seconds in them, and in one by a handle."""
    rank = int(os.environ["RANK"])
    before = dist.all_reduce
    with Clock().running() as clock:
        from bifrost.trainer.distributed.process_group import join

        join()
        clock.seconds = 0.0
        value = torch.ones(4)
        for asynchronous in (False, True):
            time.sleep(0.5 * rank)
            work = dist.all_reduce(value, async_op=asynchronous)
            if asynchronous:
                work.wait()
        assert value.tolist() == [4.0] * 4
    assert dist.all_reduce is before
    return [clock.seconds]


@pytest.mark.multi
def test_the_clock_sees_who_waits() -> None:
    (early,), (late,) = (rank.value for rank in ranked.run(collectives_of_a_slow_rank, 2))
    assert early > 0.9 and early - late > 0.5


@pytest.mark.multi
def test_ranks_of_a_launcher_add_their_point(shards: Path, tmp_path: Path) -> None:
    _, *words = runs.arguments(shards, tmp_path / "runs")
    arguments = ["bench", "scale", *words, "--mode", "strong", "--steps", "2", "--out", str(tmp_path / "out")]
    ended = ranked.run(ranked.command, 2, arguments)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    (found,) = scale.read_points(tmp_path / "out")["strong"]
    assert (found["ranks"], found["steps"], found["global_batch"], found["passes"]) == (2, 2, 8, 2)
    assert 0 < found["communication_share_least"] <= found["communication_share_most"] < 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["scale.png", "strong-0002.json"]
    assert "Strong scaling" in ended[0].out and not (tmp_path / "runs").exists()


def test_512_ranks_of_the_7b_recipe(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["bench", "scale", "mllm-7b", "--simulate", "512", "--out", str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "simulated-512.json").read_text())["sections"]
    assert {kind: part["elements"] for kind, part in found["partition"].items()} == KNOWN_7B
    assert found["data"]["readers"] == 2048 and found["data"]["resumed_on"] == [256, 8]
    save = found["checkpoint"]
    tensors = 3 * 4 * KNOWN_7B["trained"]
    assert save["files"] == 514 and tensors < save["bytes"] < 1.001 * tensors
    assert 512 * save["rank_bytes_most"] >= save["bytes"] >= 512 * save["rank_bytes_least"]
    one, other = found["resume"]["moves"]
    assert (one["from"], one["to"], other["from"], other["to"]) == (512, 256, 256, 8)
    assert one["files_per_rank_most"] in (2, 3) and other["files_per_rank_most"] in (32, 33)
    assert other["bytes_per_rank_most"] == pytest.approx(4 * KNOWN_7B["trained"] / 8, rel=0.01)


@pytest.fixture
def small() -> Parameters:
    return Parameters({"a": (7, 3), "b": (2,), "c": (64,)}, {"d": (5, 5)})


def test_slices_and_moves_of_a_small_model(small: Parameters) -> None:
    found = simulate.partition(small, 4)["trained"]
    # Slices of 6 + 1 + 16; the last rank has 3 of a's 21 and none of b's 2.
    assert (found["per_rank_most"], found["per_rank_least"], found["padding"]) == (6 + 1 + 16, 3 + 0 + 16, 3 + 2)
    # The second of two ranks needs a's elements 11 to 20, which are in slices 1, 2 and 3.
    move = simulate.move(small.trained, 4, 2)
    assert (move["files_per_rank_most"], move["bytes_per_rank_most"]) == (3, 4 * (11 + 1 + 32))


def test_a_slice_that_is_missing_is_noticed(small: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_down(numel: int, rank: int, ranks: int) -> tuple[int, int]:
        size = numel // ranks
        return rank * size, (rank + 1) * size

    monkeypatch.setattr(simulate, "local_range", rounded_down)
    with pytest.raises(simulate.Broken, match="a: the slices of 4 ranks end at 20 of 21"):
        simulate.partition(small, 4)
    with pytest.raises(RunError, match="master/a has 5 elements, its slice has 6"):
        simulate.checkpoint(small, 4, ema=False)


def test_reads_that_do_not_fit_are_noticed(small: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    right = simulate.reads
    monkeypatch.setattr(simulate, "reads", lambda *about: right(*about)[:-1])
    with pytest.raises(simulate.Broken, match="reads"):
        simulate.move(small.trained, 4, 2)


def test_a_plan_that_gives_a_sample_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = simulated_data.rank_positions
    recipe = load_recipe("mllm-7b", ["micro_batch=2"])
    with monkeypatch.context() as patch:
        # The last rank reads what the first one does.
        patch.setattr(
            simulated_data, "rank_positions", lambda step, rank, ranks, *rest: right(step, rank % 511, ranks, *rest)
        )
        with pytest.raises(simulate.Broken, match="misses"):
            simulated_data.data(recipe.data, recipe.seed, [recipe.split(512)])
    with monkeypatch.context() as patch:
        # Fewer ranks resume one step late.
        shift = lambda step, rank, ranks, *rest: right(step + (ranks == 256), rank, ranks, *rest)  # noqa: E731
        patch.setattr(simulated_data, "rank_positions", shift)
        with pytest.raises(simulate.Broken, match="256 ranks get other global batches"):
            simulated_data.data(recipe.data, recipe.seed, [recipe.split(512), recipe.split(256)])


def test_a_large_plan_that_repeats_or_drops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_data, "LARGE_SHARDS", 200)
    monkeypatch.setattr(simulated_data, "LARGE_SAMPLES", 300)
    recipe = load_recipe("mllm-7b", ["micro_batch=2"])
    splits = [recipe.split(512), recipe.split(8)]
    found = simulated_data.large_data(recipe.data, recipe.seed, splits)
    assert found["samples"] == simulated_data._counts(200, 300).sum()
    right = simulated_data.Plan.locate

    def replaced(field: str, change: Any) -> Any:
        return lambda self, at: (located := right(self, at))._replace(**{field: change(getattr(located, field))})

    for field, change, message in (
        ("sample", lambda sample: sample // 2, "group 0 misses samples or repeats some"),
        ("shard", lambda shard: shard // 20, "group 0 has"),
        ("index", lambda index: index // 2, "has a sample twice"),
    ):
        monkeypatch.setattr(simulated_data.Plan, "locate", replaced(field, change))
        with pytest.raises(simulated_data.Broken, match=message):
            simulated_data.large_data(recipe.data, recipe.seed, splits)
    monkeypatch.setattr(simulated_data.Plan, "locate", right)
    right_rows = simulated_data.rank_positions
    shift = lambda step, rank, ranks, *rest: right_rows(step + (ranks == 8), rank, ranks, *rest)  # noqa: E731
    monkeypatch.setattr(simulated_data, "rank_positions", shift)
    with pytest.raises(simulated_data.Broken, match="of 8 ranks is not global batch"):
        simulated_data.large_data(recipe.data, recipe.seed, splits)


def test_figures_are_those_of_a_walk_by_hand() -> None:
    rows = simulated_data._positions(BatchSplit(global_batch=8, micro_batch=2, ranks=2), range(5, 9), 3)
    assert rows.shape == (4, 8)
    assert np.array_equal(np.sort(rows, axis=1), 8 * np.arange(5, 9)[:, None] + np.arange(8))
    assert math.prod(rows.shape) == len(set(rows.flatten().tolist()))
