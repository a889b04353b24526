"""Triton for this machine: compiled where there is a GPU, interpreted on the CPU otherwise.

Import `triton` and `tl` from here: the interpreter must be chosen before Triton is first imported. TRITON_INTERPRET
in the environment wins, so that kernels can be compiled offline on a machine without a GPU.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)


def check_device(device: torch.device) -> None:
    """RuntimeError where Triton cannot run: on the CPU, when it was imported before it could be told to interpret."""
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "Triton was imported before bifrost.kernels and cannot be interpreted on the CPU any more: set"
            " TRITON_INTERPRET=1 in the environment, or take the reference provider"
        )


__all__ = ["INTERPRETED", "check_device", "tl", "triton"]
