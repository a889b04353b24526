"""torch.cuda's Python interface for the device, which torch's CPU build lacks: what DeepSpeed and the engine call."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .memory import Memory

NAME = "NVIDIA H200"
CAPABILITY = (9, 0)
BYTES = 141 << 30
NCCL = (2, 28, 9)


class Stream:
    """The only stream of the device; its work is always done."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """An event that has always happened."""

    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def install(memory: Memory, devices: int = 8) -> None:
    """Replace functions of torch.cuda in this process; their memory is that of `memory`."""
    properties = SimpleNamespace(
        name=NAME, total_memory=BYTES, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, uuid="0"
    )
    constant: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": devices,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "mem_get_info": (BYTES, BYTES),
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(
            ("_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed"), None
        ),
        **dict.fromkeys(("manual_seed_all", "set_rng_state"), None),
    }
    for name, value in constant.items():
        setattr(torch.cuda, name, _returning(value))
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.memory_allocated = lambda device=None: memory.live
    cuda.max_memory_allocated = lambda device=None: memory.peak
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=_returning(0), cudaHostUnregister=_returning(0))
    cuda.memory_stats = lambda device=None: defaultdict(int)
    nccl, nvtx = ModuleType("torch.cuda.nccl"), ModuleType("torch.cuda.nvtx")
    nccl.version = lambda: NCCL  # type: ignore[attr-defined]
    nvtx.range_push = nvtx.mark = lambda message: 0  # type: ignore[attr-defined]
    nvtx.range_pop = lambda: 0  # type: ignore[attr-defined]
    for name, module in (("nccl", nccl), ("nvtx", nvtx)):
        setattr(torch.cuda, name, module)
        sys.modules[module.__name__] = module
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None  # memory is freed at once here, whatever the stream


def _returning(value: Any) -> Any:
    return lambda *_, **__: value
