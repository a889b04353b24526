"""A rank that holds the others up is named, by its own work and not by its waiting."""

from pathlib import Path

import pytest
import torch

import ranked
import runs
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.monitors.phase_timer import Times
from bifrost.trainer.monitors.stragglers import LINES, Stragglers


def slow_down(arguments: list[str], section: str) -> None:
    """Train while rank 1 sleeps in its data section, or computes for longer in its forward pass."""
    import os
    import time

    from bifrost.data import Loader
    from bifrost.trainer.monitors import stragglers
    from bifrost.trainer.optim import engine

    stragglers.SHARE = 0.01  # of a step on a machine that is busy with other tests
    if os.environ["RANK"] == "1":
        read, forward = Loader.__iter__, engine.Engine.forward

        def iterate(self):
            for batch in read(self):
                time.sleep(0.8)
                yield batch

        def compute(self, batch):
            until = time.thread_time() + 0.8
            while time.thread_time() < until:
                pass
            return forward(self, batch)

        if section == "data":
            Loader.__iter__ = iterate
        else:
            engine.Engine.forward = compute
    ranked.command(arguments)


@pytest.mark.multi
@pytest.mark.parametrize("section", ["data", "forward"])
def test_a_slow_rank_is_named_once(shards: Path, tmp_path: Path, section: str) -> None:
    arguments = runs.arguments(shards, tmp_path, f"steps={LINES + 2}", "micro_batch=4")
    ended = ranked.run(slow_down, 2, arguments, section)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run = tmp_path / "tiny-mllm"
    (event,) = runs.events(run, "straggler")
    assert (event["rank"], event["phase"], event["step"]) == (1, section, LINES)
    assert event["seconds"] > 0.7 > event["others_median_s"]
    assert all(line["slowest_rank"] == 1 and line["rank_work_s_max"] > 0.7 for line in runs.steps(run))


def watch(others: list[list[list[float]]], own: float = 1.0) -> list[dict]:
    """The events of log lines at which rank 0 has `own` seconds of forward and the others these rows."""
    events: list[dict] = []
    stragglers = Stragglers(Ranks(0, 4, torch.device("cpu")), ["a", "b", "c", "d"], events.append)
    times = Times({"forward": 2.0}, {"forward": own}, 1)
    for step, rows in enumerate(others):
        stragglers.collect(step, times, [stragglers.rank_work(times), *rows])
    return events


def row(forward: float, data: float = 0.0) -> list[float]:
    return [data, forward, 0.0, 0.0]


def test_who_is_a_straggler() -> None:
    slow = [row(1.0), row(1.0, data=0.9), row(1.1)]
    even = [row(1.0), row(1.05), row(1.1)]
    (event,) = watch([slow] * 6)
    assert (event["rank"], event["host"], event["phase"], event["step"]) == (2, "c", "data", LINES - 1)
    assert not watch([slow, slow, even] * 3), "not in a row"
    assert len(watch([*[slow] * 4, even, *[slow] * 4])) == 2, "it recovered and is slow again"
    spread = [row(0.4), row(1.6), row(2.4)]
    assert not watch([spread] * 6), "the ranks differ as a rule"
    assert not watch([[row(1.0), row(1.3), row(1.0)]] * 6), "less than a fifth of the step"
