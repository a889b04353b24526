"""How long a step waits for a save: for the copy in memory alone, not for hashing and writing.

The bound is a third of what the same save takes when it is waited for: a step that waited for the files would take
all of it or more, and how far below a third the copy is depends on the disk more than on the saver.

`pytest tests/trainer/checkpoint/test_stall.py -s` prints the figures: 64 million parameters with both moments and an
average, 1 GiB on two ranks, which keep computing while it is written.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import ranked

PARAMETERS = {f"layer{i}.weight": (2048, 2048) for i in range(16)}
SLOTS = ("master", "exp_avg", "exp_avg_sq", "ema")
ROUNDS = 3


def measure(folder: str) -> list[dict]:
    from bifrost.recipes.schema import Checkpoint
    from bifrost.trainer.checkpoint.layout import local_range
    from bifrost.trainer.checkpoint.manager import CheckpointManager
    from bifrost.trainer.checkpoint.store import Store
    from bifrost.trainer.distributed.process_group import join

    ranks = join()
    sizes = {name: torch.Size(shape).numel() for name, shape in PARAMETERS.items()}
    held = {name: local_range(numel, ranks.rank, ranks.size) for name, numel in sizes.items()}
    slots = {slot: {name: torch.randn(hi - lo) for name, (lo, hi) in held.items()} for slot in SLOTS}
    events: list[dict] = []
    saver = CheckpointManager(
        Store(folder),
        Checkpoint(keep=1),
        slots,
        lambda e: events.append(dict(e)),
        ranks.background_group(),
    )
    work = torch.randn(512, 512)
    for step in range(1, 2 * ROUNDS + 1):
        saver.save(step, slots, PARAMETERS, {}, {})
        if step % 2:
            saver.wait()  # the synchronous save
        while not all(ranks.gather(len(events) == step)):  # training continues, with all ranks in lockstep
            work = torch.tanh(work @ work)
            saver.await_copy()  # the update
    return events


@pytest.mark.multi
@pytest.mark.slow
def test_a_step_waits_for_the_copy_alone(tmp_path: Path) -> None:
    for rank, ended in enumerate(ranked.run(measure, 2, str(tmp_path / "checkpoints"), timeout=500)):
        assert ended.code == 0, ended.err
        events = ended.value
        whole = statistics.median(event["seconds"] for event in events[::2])
        stall = statistics.median(event["blocked_s"] for event in events[1::2])
        print(
            f"rank {rank}: {events[0]['bytes'] / 2**30:.2f} GiB, waited for {whole:.2f} s, in the background a stall of"
            f" {stall:.3f} s, {stall / whole:.1%}; written in"
            f" {statistics.median(event['seconds'] for event in events[1::2]):.2f} s"
        )
        assert stall < whole / 3
