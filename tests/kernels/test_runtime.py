"""Triton is interpreted without a GPU, whatever imports it first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CLEAN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_trainer_imports_runtime_before_triton() -> None:
    """transformers' Qwen2.5-VL also imports Triton, after which it would be too late."""
    program = (
        "import bifrost.trainer.training.train\nfrom bifrost.kernels.runtime import INTERPRETED; print(INTERPRETED)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=CLEAN)
    assert ended.stdout.strip() == "True", ended.stderr


@pytest.mark.parametrize(("interpreted", "seen"), [(None, ""), ("1", ""), ("0", "3")])
def test_gpus_are_visible_only_to_compiled_kernels(interpreted: str | None, seen: str) -> None:
    """Otherwise interpreted kernels would be taken for compiled ones, and CPU ranks would use NCCL."""
    program = "import os, runpy, sys; runpy.run_path(sys.argv[1]); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = {**CLEAN, "CUDA_VISIBLE_DEVICES": "3"} | ({"TRITON_INTERPRET": interpreted} if interpreted else {})
    command = [sys.executable, "-c", program, str(Path(__file__).parents[1] / "conftest.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stdout.strip("\n") == seen, ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_late_import_is_a_one_line_error() -> None:
    program = (
        "import torch, triton; from bifrost.kernels import patch_latent_loss; x = torch.ones(2, 8);"
        "patch_latent_loss(x, torch.ones(8, 8), None, x, torch.ones(2), 1.0, provider='triton')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=CLEAN)
    assert ended.returncode
    assert "set TRITON_INTERPRET=1" in ended.stderr.strip().splitlines()[-1]
