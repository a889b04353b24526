"""The mode in which "cuda" is the phantom device: its tensors are fake and counted, those of the host are real.

So host code runs as it is, tables included, and only what would be on the GPU has no values.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .flops import Flops
from .memory import Memory, on_device
from .torch_cuda import install

READS = {"_local_scalar_dense", "is_nonzero", "equal"}
"""Operators that give the host a value: it waits for the device."""
COPIES = {"_to_copy", "copy_"}
"""Operators that copy between host and device if asked to."""
ROOT = Path(__file__).parents[2]
LIBRARIES = ("deepspeed", "diffusers", "transformers")
"""Libraries that may be the place of a wait, as our own files are."""


class _Fake(FakeTensorMode):
    """Fake tensors without a device to initialise, although torch.cuda reports one: no constant is copied to it."""

    avoid_device_init = True  # type: ignore[assignment]


class Phantom(TorchDispatchMode):
    """Within it, every tensor on "cuda" is fake.

    reads: place in the code -> number of times the host waited there for a value or a copy from the device.
    copies: place -> number of copies from host to device that the host waits for, or that an operator makes by itself
    because one of its inputs is on the host. Scalars that the host reads are 1, or False; its copies are zeros.
    memory, flops: of the operators within it.
    """

    # Of the process, as a device is: tables that outlive a mode are of the next one too.
    _fake = _Fake(allow_non_fake_inputs=True)
    _values: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.flops = Memory(), Flops(self.value)
        install(self.memory)
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._host_too = False

    @contextmanager
    def fake_host(self, asked: bool = True) -> Iterator[None]:
        """Within it, new tensors of the host are fake, too, if `asked`."""
        before, self._host_too = self._host_too, asked
        try:
            yield
        finally:
            self._host_too = before

    def __enter__(self) -> Phantom:
        # torch.tensor(…, device="cuda") shall make its tensor on the host and then copy it, through this mode.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def restart(self) -> None:
        """Count from now on."""
        self.memory.restart()
        for counts in (self.flops.counts, self.reads, self.copies):
            counts.clear()

    def value(self, tensor: Tensor) -> Tensor | None:
        """The values of a table [...] that was copied from the host; None for tensors that the device computed."""
        found = self._values.get(_storage(tensor))
        return found if found is not None and found.shape == tensor.shape else None

    def _keep_values(self, table: Tensor, values: Tensor) -> None:
        """Until `table`, on the device, is gone."""
        key = _storage(table)
        self._values[key] = values
        weakref.finalize(table.untyped_storage(), self._values.pop, key, None).atexit = False

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        settings = dict(settings or {})
        pinned = settings.pop("pin_memory", False)  # of such memory only copies to the device are made
        inputs = [x for x in tree_leaves((arguments, settings)) if isinstance(x, Tensor)]
        device = settings.get("device")
        here = any(isinstance(x, FakeTensor) for x in inputs)
        host = device is None or torch.device(device).type != "cuda"
        if not here and host and not (pinned or self._host_too):
            return operator(*arguments, **settings)
        name = operator._schema.name.removeprefix("aten::")
        if name in READS and any(on_device(x) for x in inputs):
            self.reads[place(name)] += 1
            return _scalar(name, inputs[0])
        with self._fake:
            result = operator(*arguments, **settings)
        self._note_transfers(name, inputs, arguments, settings, result)
        if name == "_to_copy" and on_device(inputs[0]) and not on_device(result):
            return torch.zeros(result.shape, dtype=result.dtype)  # the host can use it, as the copies of a save
        self.memory.saw(result)
        self.flops.saw(operator, arguments, result)
        return result

    def _note_transfers(
        self, name: str, inputs: list[Tensor], arguments: tuple[Any, ...], settings: dict[str, Any], result: Any
    ) -> None:
        """Record copies between host and device, and the values of tables that are copied to it."""
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        from_host = [x for x in inputs if not on_device(x) and x.dim() and x.numel()]
        to_device = any(map(on_device, outputs))
        waits = not (settings.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2]))
        if to_device and from_host:
            source = from_host[0]
            if name == "_to_copy" and not isinstance(source, FakeTensor) and not source.is_floating_point():
                self._keep_values(outputs[0], source)
            if waits or name not in COPIES:
                self.copies[place(name)] += 1
        elif name in COPIES and waits and any(map(on_device, inputs)) and not to_device:
            self.reads[place(name)] += 1


def _scalar(name: str, of: Tensor) -> bool | int | float:
    if name == "equal":
        return True
    if of.dtype == torch.bool or name == "is_nonzero":
        return False
    return 1.0 if of.is_floating_point() else 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def place(what: str) -> str:
    """`file: function (what)` of the innermost frame that is in this project or in one of `LIBRARIES`."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and Path(__file__).parent not in file.parents:
            inside = file.relative_to(ROOT).parts
            if "site-packages" not in inside or any(library in inside for library in LIBRARIES):
                return f"{'/'.join(inside[-2:])}: {frame.f_code.co_name} ({what})"
        elif any(library in file.parts for library in LIBRARIES):
            return f"{'/'.join(file.parts[-2:])}: {frame.f_code.co_name} ({what})"
        frame = frame.f_back
    return what
