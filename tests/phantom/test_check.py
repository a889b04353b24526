"""`bifrost plan --check`: counted next to planned figures, with the exit code of their agreement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.trainer.phantom import check


def checked(*arguments: str) -> tuple[int, str]:
    from bifrost.trainer.cli.main import app

    ended = CliRunner().invoke(app, ["plan", "tiny-mllm", "--check", "--gpus", "8", "--text-tokens", "64", *arguments])
    return ended.exit_code, ended.output


@pytest.mark.slow
def test_a_plan_that_agrees_is_a_table() -> None:
    code, printed = checked()
    assert code == 0, printed
    lines = printed.splitlines()
    for what in ("FLOPs per sample", "kept per sample", "held on 8 GPUs"):
        assert [line for line in lines if what in line and " yes " in line], printed


def test_a_plan_that_does_not_agree_has_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"flops": 1e9, "kept": 1e9, "peak": 1e9, "held": 1e6, "reads": {"loop.py: run": 3}, "copies": {}}
    monkeypatch.setattr(check, "count", lambda *_: {**counts, "wrong": ["table: torch.bfloat16"], "applied": False})
    code, printed = checked("--json")
    found = json.loads(printed)
    assert code == 1 and not found["agrees"]
    assert [row["agrees"] for row in found["rows"]] == [False, False, False]
    assert found["problems"] == [
        "the host waits for a value, 3 x: loop.py: run",
        "buffer table: torch.bfloat16",
        "a step did not update the weights",
    ]


def test_without_a_compiler_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bifrost.trainer", "plan", "tiny-mllm", "--check"]
    ended = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: the phantom GPU needs g++, which is not installed; install it\n"
