"""Memory of this rank: peak usage, headroom, and allocator retries."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak(device: torch.device) -> int:
    """Peak bytes in use since the start: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def headroom(device: torch.device) -> int:
    """Free bytes: of the GPU at the allocator's peak, or of the host now on a CPU.

    GPU memory outside the allocator, such as CUDA's context and NCCL's buffers, counts as used.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - (torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device))
    return psutil.virtual_memory().available


def retries(device: torch.device) -> int:
    """Allocations since the start that failed until the GPU's allocator emptied its cache; 0 on a CPU."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0
