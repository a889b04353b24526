"""Memory of this rank: the most in use, what is left beside that, and how often the allocator had to give back."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak(device: torch.device) -> int:
    """Most bytes in use at a time since the start: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The kernel counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def headroom(device: torch.device) -> int:
    """Bytes that nobody has taken: of the GPU when the allocator held the most, of the host now on a CPU.

    What the GPU holds beside the allocator, such as CUDA's context and NCCL's buffers, counts as taken.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - (torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device))
    return psutil.virtual_memory().available


def retries(device: torch.device) -> int:
    """How often since the start the GPU's allocator found no room, emptied its cache and tried again; 0 on a CPU."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0
