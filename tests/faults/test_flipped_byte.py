"""One flipped byte in any file of the newest checkpoint: the file is named and the previous checkpoint is used."""

import shutil
from pathlib import Path

import pytest

import ranked
import runs
import small_model

pytestmark = pytest.mark.multi


def test_damaged_file_is_named_and_the_previous_checkpoint_used(shards: Path, tmp_path: Path) -> None:
    settings = ["steps=4", "checkpoint.every=2", "ema.decay=0.9", *small_model.settings(tmp_path / "backbone")]
    assert [rank.code for rank in ranked.bifrost(2, *runs.arguments(shards, tmp_path / "sound", *settings))] == [0, 0]
    sound = tmp_path / "sound" / "tiny-mllm"
    files = sorted(file.name for file in (sound / "checkpoints/step-00000004").iterdir())
    assert {"manifest.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors"} <= set(files)
    for name in files:
        run = tmp_path / name / "tiny-mllm"
        shutil.copytree(sound, run)
        damaged = run / "checkpoints/step-00000004" / name
        content = damaged.read_bytes()
        middle = len(content) // 2
        damaged.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])

        ended = ranked.bifrost(2, *runs.arguments(shards, run.parent, *settings))
        assert [rank.code for rank in ended] == [0, 0]
        assert f"checkpoint of step 4 refused: step-00000004/{name}: damaged" in ended[0].err
        assert [start["step"] for start in runs.events(run, "start")] == [0, 2]
        assert runs.losses(run) == runs.losses(sound)
        for rank in range(2):  # the damaged one was replaced
            file = f"checkpoints/step-00000004/rank-{rank:05d}.safetensors"
            assert (run / file).read_bytes() == (sound / file).read_bytes()
