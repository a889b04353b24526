"""Triton for this machine: compiled with a GPU, interpreted on the CPU otherwise.

Import `triton` and `tl` from here: the interpreter must be selected before Triton is first imported. The environment
variable TRITON_INTERPRET takes precedence, so that kernels can be compiled offline without a GPU.
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


def accumulator(x: torch.Tensor) -> torch.dtype:
    """The dtype in which kernels compute: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_accumulator(x: torch.Tensor) -> tl.dtype:
    """`accumulator` as Triton's type."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def check_device(device: torch.device) -> None:
    """Raise RuntimeError if Triton cannot run: on the CPU, when it was imported before the interpreter was selected."""
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "Triton was imported before bifrost.kernels and can no longer be interpreted on the CPU: set"
            " TRITON_INTERPRET=1 in the environment, or use the reference provider"
        )


__all__ = ["INTERPRETED", "accumulator", "check_device", "tl", "triton", "triton_accumulator"]
