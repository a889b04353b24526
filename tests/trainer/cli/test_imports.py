"""What a command imports: nothing that it does not use, so that it answers at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost.trainer.checkpoint.durable import write_file
from bifrost.trainer.checkpoint.manifest import Manifest

PROBE = """
import json, sys
from bifrost.trainer.cli.main import app
code = app(sys.argv[2:], standalone_mode=False)
assert not code, code
found = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(found & set(json.loads(sys.argv[1])))), file=sys.stderr)
"""
FRAMEWORKS = ("deepspeed", "diffusers", "mlflow", "torch", "torchmetrics", "transformers", "triton", "scipy", "sympy")
LIBRARIES = ("asyncio", "fsspec", "jinja2", "matplotlib", "numpy", "pandas", "PIL", "psutil", "pyarrow", "webdataset")
HELP = (*FRAMEWORKS, *LIBRARIES, "tenacity", "yaml", "braceexpand")


def imported(unwanted: tuple[str, ...], folder: Path, *arguments: str) -> list[str]:
    """Which of the packages `unwanted` the command imports when run in `folder`, whose programs it finds first."""
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(unwanted), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        ("--help", (*HELP, "pydantic")),  # typer imports pydantic to parse the arguments of a sub-command
        ("--version", (*HELP, "pydantic", "rich")),
        ("data demo --help", HELP),
        ("train --help", HELP),
    ],
)
def test_help_imports_only_the_command_line(command: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    assert imported(unwanted, tmp_path, *command.split()) == []


@pytest.mark.parametrize(
    "command",
    [
        "plan mllm-7b --gpus 8 --device h200",
        "plan tiny-controlnet --gpus 2",
        "train tiny-mllm --dry-run --ranks 2",
        "train flux-controlnet --dry-run --ranks 8",
    ],
)
def test_counting_a_recipe_imports_no_framework(command: str, tmp_path: Path) -> None:
    assert imported((*FRAMEWORKS, "matplotlib", "pandas", "pyarrow", "PIL"), tmp_path, *command.split()) == []


def test_listing_checkpoints_imports_no_framework(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    files = {"state.json": write_file(folder / "state.json", {"file": [b"{}"]})}
    Manifest(step=1, ranks=1, time=0.0, slots=[], shapes={}, files=files).write(folder)
    for command in ("list", "verify"):
        assert imported((*FRAMEWORKS, *LIBRARIES), tmp_path, "checkpoint", command, "run") == []


RANK = """
import sys
import torch
import bifrost.trainer.training.train
import bifrost.kernels.runtime
from bifrost.trainer.optim.engine import import_deepspeed
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
import_deepspeed(torch.device("cpu"))
from deepspeed.runtime.zero.muon import muon_optimizer  # as DeepSpeed's engine does
unwanted = {"diffusers", "mlflow", "pandas", "scipy", "matplotlib", "torch._inductor.compile_fx"}
print(*(unwanted & set(sys.modules)), bifrost.kernels.runtime.INTERPRETED)
import mlflow
"""


def test_a_rank_of_stage_1_imports_no_image_model_and_no_tracking(tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-c", RANK], cwd=tmp_path, env=hidden, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "True"


def test_submitting_a_job_imports_no_framework(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    submit = ["slurm", "submit", "tiny-mllm", "--gpus-per-node", "0", "--tasks-per-node", "2", "runs_dir=runs"]
    assert imported((*FRAMEWORKS, "matplotlib", "pandas", "pyarrow"), tmp_path, *submit) == []
    assert (tmp_path / "runs/tiny-mllm/slurm/job.json").is_file()
