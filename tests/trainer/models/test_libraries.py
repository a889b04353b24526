"""Triton's interpreter is enabled before transformers or diffusers import Triton; a program may import these first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(__file__).parents[3] / "trainer"
FILES = [file for name in ("models", "stages", "inference", "bench") for file in sorted((TRAINER / name).glob("*.py"))]


def libraries(file: Path) -> list[str]:
    """The modules that `file` imports at its top, in order; `libraries` for models/libraries.py."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [name.name.partition(".")[0] for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found += [name.name for name in node.names if name.name == "libraries"]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_interpreter_is_enabled_first(file: Path) -> None:
    names = libraries(file)
    for name in ("transformers", "diffusers"):
        if name in names:
            assert "libraries" in names[: names.index(name)]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["from transformers import Qwen2_5_VLConfig", "from diffusers import FluxPipeline"])
def test_a_program_may_import_the_libraries_first(first: str) -> None:
    """They remember then that scipy and torchao are there."""
    code = (
        f"{first}; from bifrost import BifrostPipeline; from bifrost.trainer.stages.patch_latent_model import __name__"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
