"""Shards that are not those of the run: the refusal states what the run had and what is there now."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bifrost.data import open_dataset, write_shard
from bifrost.trainer.errors import RunError
from bifrost.trainer.training.inputs import check_continuation


def shards(folder: Path, *counts: int, caption: bytes = b"x") -> Any:
    for number, count in enumerate(counts):
        samples = [(f"{number}-{i}", {"png": b"image", "txt": caption}) for i in range(count)]
        write_shard(folder / f"s-{number}.tar", samples)
    return open_dataset(str(folder / "*.tar"))


@pytest.mark.parametrize(
    ("now", "recorded", "difference"),
    [
        ((3,), True, "5 samples in 2 shards then, 3 samples in 1 shard now"),
        ((3, 3), True, "5 samples in 2 shards then, 6 samples in 2 shards now"),
        ((3, 2), True, "content differs"),
        ((3,), False, "content differs"),
    ],
)
def test_other_shards_are_refused_with_both_counts(
    tmp_path: Path, now: tuple[int, ...], recorded: bool, difference: str
) -> None:
    before, after = shards(tmp_path / "before", 3, 2), shards(tmp_path / "after", *now, caption=b"y")
    run = tmp_path / "run"
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    if recorded:
        described = {"shards": 2, "samples": 5, "fingerprint": before.fingerprint}
        (run / "environment.json").write_text(json.dumps({"dataset": described}))
    settings = {"name": "cats", "stage": "patch-latents", "data": {"shards": "after/*.tar"}}
    inputs: Any = SimpleNamespace(dataset=after, stage=SimpleNamespace(source="tiny", identity=()))
    state = {"recipe": settings, "backbone": "a", "data": before.fingerprint}
    with pytest.raises(RunError) as refused:
        check_continuation(settings, inputs, "a", state, run / "checkpoints/step-00000001")
    words = (
        f"was trained on other shards than data.shards=after/*.tar ({difference}): restore them, or take another name"
    )
    assert words in str(refused.value)
