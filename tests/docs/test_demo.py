"""`make demo` at a reduced size: its own commands, in a world of few things, with fewer steps."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import small_world

ROOT = Path(__file__).parents[2]
SMALLER = {
    "recipes/tiny-mllm.yaml": ("steps=110", "global_batch=32", "micro_batch=16", "checkpoint.every=20", "log_every=10"),
    "recipes/tiny-controlnet.yaml": ("steps=100", "global_batch=16", "micro_batch=8"),
    "340": ("50",),
    "validation.every=150": ("validation.every=55",),
}
"""Word of the demo's commands -> what is added after it, or for the other words, replaces it."""


def commands() -> list[list[str]]:
    """Those of `make demo` after the data, made smaller, with this Python."""
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    first, *lines = [shlex.split(line) for line in shown.stdout.replace("\\\n", " ").splitlines() if ".venv" in line]
    assert first[1:] == ["data", "demo", "demo"]
    return [[word for found in words for word in _smaller(found)] for words in lines]


def _smaller(word: str) -> list[str]:
    if word.startswith(".venv/bin/"):
        return [str(Path(sys.executable).parent / Path(word).name)]
    if word.startswith("examples/"):
        return [str(ROOT / word)]
    if word.startswith("recipes/"):
        return [str(ROOT / word), *SMALLER[word]]
    return list(SMALLER.get(word, (word,)))


@pytest.mark.multi
@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    small_world.write(tmp_path / "demo")
    printed = ""
    for words in commands():
        ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        printed = ended.stdout
    records = [json.loads(line) for line in (tmp_path / "runs/tiny-mllm/metrics.jsonl").read_text().splitlines()]
    starts = [record for record in records if record.get("event") == "start"]
    assert [start["step"] for start in starts] == [0, 40] and starts[1]["lost_steps"] >= 10, "killed and resumed"
    assert any("val_loss_ema" in record for record in records)

    figures = json.loads((tmp_path / "runs/demo/metrics.json").read_text())
    for part in ("heldout", "seen"):
        found = {control: rows["two"]["all"] for control, rows in figures["scenes"][part].items()}
        assert found["both"] >= 0.6 and found["probe"] >= 0.8, found
        assert found["true_latents"] >= 0.7 and found["latents_alone"] >= 0.5, found
        assert found["shuffled"] <= 0.05 and found["probe_shuffled"] <= 0.05, found
        assert found["flux_alone"] <= 0.7, "which object is on the left is in no caption of FLUX: half is chance"
        swapped = figures["scenes"][part]["swapped"]["two"]
        assert swapped["latents_win"] > swapped["caption_wins"], swapped
        assert f"{found['both']:.2f}" in printed
    understanding = figures["understanding"]
    assert understanding["equal"] and understanding["before"] == understanding["after"]
    assert understanding["before"]["all"] >= 0.7
