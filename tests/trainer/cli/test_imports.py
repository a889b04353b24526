"""What a command imports: nothing that it does not use, so that it answers at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_submitting_a_job_imports_no_framework(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    submit = ["slurm", "submit", "tiny-mllm", "--gpus-per-node", "0", "--tasks-per-node", "2", "runs_dir=runs"]
    assert imported((*FRAMEWORKS, "matplotlib", "pandas", "pyarrow"), tmp_path, *submit) == []
    assert (tmp_path / "runs/tiny-mllm/slurm/job.json").is_file()
