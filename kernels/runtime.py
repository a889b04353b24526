"""Triton for this machine: compiled where there is a GPU, interpreted on the CPU otherwise.

Import `triton` and `tl` from here: the interpreter must be chosen before Triton is first imported. TRITON_INTERPRET
in the environment wins, so that kernels can be compiled offline on a machine without a GPU.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)

__all__ = ["INTERPRETED", "tl", "triton"]
