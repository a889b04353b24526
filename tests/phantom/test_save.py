"""Save and resume on the phantom GPU: the copy from the device, the state from a checkpoint, and what both leave."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import phantoms
from bifrost.recipes import load_recipe
from bifrost.trainer.planner import checkpoint_bytes, parts, workload


class Notes:
    """In a process with the phantom GPU: bytes held, and waits of the host since the last note."""

    def __init__(self, mode: Any) -> None:
        self.mode, self.held, self.waits = mode, [], []

    def take(self) -> None:
        gc.collect()
        self.held.append(self.mode.memory.live)
        self.waits.append([dict(self.mode.reads), dict(self.mode.copies)])
        self.mode.restart()


def save(name: str, ranks: int, text_tokens: int, folder: str) -> dict[str, Any]:
    """Notes of the first of `ranks` ranks before a save, after its copy, and after the next step."""
    from bifrost.trainer.checkpoint.layout import rank_file
    from bifrost.trainer.checkpoint.manager import CheckpointManager
    from bifrost.trainer.checkpoint.manifest import read_manifest
    from bifrost.trainer.checkpoint.state import capture, capture_statistics
    from bifrost.trainer.checkpoint.store import Store
    from bifrost.trainer.distributed.process_group import Group
    from bifrost.trainer.phantom.engine import FirstRank
    from bifrost.trainer.phantom.mode import Phantom

    mode, recipe, store = Phantom(), load_recipe(name), Store(folder)
    notes = Notes(mode)
    with mode:
        rank = FirstRank(mode, recipe, ranks, text_tokens)
        slots, _ = capture(rank.engine, rank.ema)
        saver = CheckpointManager(store, recipe.checkpoint, slots, lambda event: None, Group(0, ranks))
        rank.step()
        mode.restart()
        rank.step()
        notes.take()
        statistics = capture_statistics(rank.engine, rank.ema)
        saver.save(2, *capture(rank.engine, rank.ema), {"updates": 2}, statistics)
        saver.await_copy()
        notes.take()
        rank.step()
        saver.finish()
        notes.take()
    size = read_manifest(store.folder(2)).files[rank_file(0)].size
    return {"held": notes.held, "waits": notes.waits, "statistics": len(statistics), "bytes": size}


def resume(name: str, ranks: int, text_tokens: int, folder: str) -> dict[str, Any]:
    """Notes after the state is restored and a step was made; devices and types of the state."""
    from bifrost.trainer.checkpoint.state import capture, refresh, restore
    from bifrost.trainer.checkpoint.store import Store
    from bifrost.trainer.phantom.engine import FirstRank
    from bifrost.trainer.phantom.mode import Phantom

    mode = Phantom()
    notes = Notes(mode)
    with mode:
        rank = FirstRank(mode, load_recipe(name), ranks, text_tokens)
        reader = Store(folder).newest_verified(ranks=ranks)
        assert reader is not None
        restore(rank.engine, rank.ema, reader, reader.state["updates"])
        refresh(rank.engine)
        rank.step()
        mode.restart()
        rank.step()
        notes.take()
        slots, _ = capture(rank.engine, rank.ema)
        on = sorted({f"{x.device} {x.dtype}" for held in slots.values() for x in held.values()})
    return {"held": notes.held, "waits": notes.waits, "on": on}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "text_tokens"),
    [
        ("tiny-controlnet", 8, 64),
        pytest.param("tiny-mllm", 8, 64, marks=pytest.mark.real_size),
        pytest.param("mllm-7b", 64, 80, marks=pytest.mark.real_size),
        pytest.param("flux-controlnet", 64, 80, marks=pytest.mark.real_size),
    ],
)
def test_a_save_and_a_resume_leave_the_device_as_it_was(
    name: str, ranks: int, text_tokens: int, tmp_path: Path
) -> None:
    recipe = load_recipe(name)
    where = name, ranks, text_tokens, str(tmp_path)
    saved, resumed = phantoms.run(save, *where), phantoms.run(resume, *where)
    assert saved["held"] + resumed["held"] == [saved["held"][0]] * 4
    step, of_save, next_step = saved["waits"]
    assert resumed["waits"] == [step] and next_step == step and sum(step[0].values()) == 1 and step[1] == {}
    assert sum(of_save[0].values()) == saved["statistics"] and of_save[1] == {}
    assert saved["bytes"] == pytest.approx(checkpoint_bytes(parts(recipe), workload(recipe)) / ranks, rel=0.02)
    assert resumed["on"] == ["cuda:0 torch.float32"]
