"""Save and resume on the phantom GPU: the copy from the device, the state from a checkpoint, and what both leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phantoms
from bifrost.recipes import load_recipe
from bifrost.trainer.planner import checkpoint_bytes, parts, workload


def save_and_resume(name: str, ranks: int, text_tokens: int, folder: str) -> dict[str, Any]:
    """Of the first of `ranks` ranks: bytes held and waits of the host around a save, and around a resume from it."""
    from bifrost.trainer.checkpoint.layout import rank_file
    from bifrost.trainer.checkpoint.manager import CheckpointManager
    from bifrost.trainer.checkpoint.state import capture, capture_statistics, refresh, restore
    from bifrost.trainer.checkpoint.store import Store
    from bifrost.trainer.distributed.process_group import Group
    from bifrost.trainer.phantom.engine import FirstRank
    from bifrost.trainer.phantom.mode import Phantom

    mode, recipe, store = Phantom(), load_recipe(name), Store(folder)
    found: dict[str, Any] = {"held": [], "waits": []}

    def note() -> None:
        found["held"].append(mode.memory.live)
        found["waits"].append([dict(mode.reads), dict(mode.copies)])
        mode.restart()

    with mode:
        rank = FirstRank(mode, recipe, ranks, text_tokens)
        slots, _ = capture(rank.engine, rank.ema)
        saver = CheckpointManager(store, recipe.checkpoint, slots, lambda event: None, Group(0, ranks))
        rank.step()
        mode.restart()
        rank.step()
        note()
        statistics = capture_statistics(rank.engine, rank.ema)
        saver.save(2, *capture(rank.engine, rank.ema), {"updates": 2}, statistics)
        saver.await_copy()
        note()
        rank.step()
        saver.finish()
        note()
        found["statistics"] = len(statistics)
        del rank, saver, slots, statistics

        rank = FirstRank(mode, recipe, ranks, text_tokens)
        reader = store.newest_verified(ranks=ranks)
        assert reader is not None
        restore(rank.engine, rank.ema, reader, reader.state["updates"])
        refresh(rank.engine)
        rank.step()
        mode.restart()
        rank.step()
        note()
        slots, _ = capture(rank.engine, rank.ema)
        found["on"] = sorted({f"{x.device} {x.dtype}" for held in slots.values() for x in held.values()})
    return {**found, "bytes": reader.manifest.files[rank_file(0)].size}


@pytest.mark.parametrize(
    ("name", "ranks", "text_tokens"),
    [
        ("tiny-mllm", 8, 64),
        ("tiny-controlnet", 8, 64),
        pytest.param("mllm-7b", 512, 80, marks=pytest.mark.real_size),
        pytest.param("flux-controlnet", 512, 80, marks=pytest.mark.real_size),
    ],
)
def test_a_save_and_a_resume_leave_the_device_as_it_was(
    name: str, ranks: int, text_tokens: int, tmp_path: Path
) -> None:
    recipe = load_recipe(name)
    found = phantoms.run(save_and_resume, name, ranks, text_tokens, str(tmp_path))
    assert found["on"] == ["cuda:0 torch.float32"]
    assert found["held"] == [found["held"][0]] * 4
    step, save, again, resumed = found["waits"]
    assert step == again == resumed and sum(step[0].values()) == 1 and step[1] == {}
    assert sum(save[0].values()) == found["statistics"] and save[1] == {}
    assert found["bytes"] == pytest.approx(checkpoint_bytes(parts(recipe), workload(recipe)) / ranks, rel=0.02)
