"""Machine code (SASS) of a compiled kernel: disassembled without a GPU, with the instructions of its parts counted.

Triton's package contains NVIDIA's disassembler. `disassemble` runs it on a compiled kernel, `count` finds the main loop
of a GEMM in its output: the innermost loop with matrix instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

MATRIX = "HGMMA"
"""Asynchronous matrix instruction of a warp group, on sm_90."""
TENSOR_LOAD = "UTMALDG"
"""Load of a tile through a tensor descriptor (TMA)."""

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P[T\d]+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L[\w.$]*):")
_TARGET = re.compile(r"`\((\.L[\w.$]*)\)")
_SHAPE = re.compile(rf"{MATRIX}\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Counts:
    """Instructions that one warp issues in the parts of a GEMM, with the matrix instructions of its main loop."""

    loop: int
    """Of one iteration of the main loop."""
    before: int
    """Ahead of the main loop."""
    after: int
    """From the end of the main loop to the end of the kernel: the epilogue."""
    multiply_adds: int
    """Products that the matrix instructions of one iteration compute, for one warp group."""
    matrix: int
    """Matrix instructions of one iteration."""
    tensor_loads: int
    """Loads through tensor descriptors, in the whole kernel."""


def disassembler() -> Path:
    """Triton's nvdisasm; FileNotFoundError, with what to do, if this package of Triton has none."""
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not found.is_file():
        raise FileNotFoundError(f"Triton {triton.__version__} has no {found.name} in {found.parent}: install its wheel")
    return found


def disassemble(cubin: bytes) -> str:
    """Listing of a compiled kernel; RuntimeError with the disassembler's message if it cannot read it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ended = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"nvdisasm failed: {(ended.stderr or ended.stdout).strip()[:200]}")
    return ended.stdout


def count(listing: str) -> Counts:
    """Instructions of the kernel in `listing`; ValueError if no loop has matrix instructions."""
    code = _read(listing)
    first, last = _main_loop(code)
    opcodes = [instruction.opcode for instruction in code]
    end = next((at for at in range(last + 1, len(code)) if code[at].leaves), len(code) - 1)
    shapes = Counter(shape.groups() for opcode in opcodes[first : last + 1] if (shape := _SHAPE.match(opcode)))
    return Counts(
        loop=last + 1 - first,
        before=first,
        after=end - last,
        multiply_adds=sum(int(m) * int(n) * int(k) * times for (m, n, k), times in shapes.items()),
        matrix=shapes.total(),
        tensor_loads=sum(opcode.startswith(TENSOR_LOAD) for opcode in opcodes),
    )


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    conditional: bool
    target: int | None
    """Instruction that it branches to."""

    @property
    def leaves(self) -> bool:
        """Whether no warp executes the instruction below it next."""
        return not self.conditional and self.opcode.split(".")[0] in ("BRA", "EXIT")


def _read(listing: str) -> list[_Instruction]:
    labels: dict[str, int] = {}
    found: list[re.Match[str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _LINE.match(line):
            found.append(instruction)
    code = []
    for predicate, opcode, operands in (match.groups() for match in found):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        code.append(_Instruction(opcode, bool(predicate), labels.get(target[1]) if target else None))
    return code


def _main_loop(code: list[_Instruction]) -> tuple[int, int]:
    """First and last instruction of the first innermost loop with matrix instructions.

    A loop ends in a branch to its first instruction. Waits that are retried are far below, at the kernel's end, and
    jump back into the middle of the loop, so that they begin later than it.
    """
    loops = [
        (each.target, at)
        for at, each in enumerate(code)
        if each.target is not None
        and each.target < at
        and any(inner.opcode.startswith(MATRIX) for inner in code[each.target : at])
    ]
    if not loops:
        raise ValueError(f"no loop has {MATRIX}")
    return min(a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops))
