"""What the machine code of the GEMMs must contain, how much of it there may be, and the bound that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .latent_loss_triton import descriptor_kernel
from .runtime import triton
from .sass import TENSOR_LOAD, Counts, count
from .static_bound import Gemm

if TYPE_CHECKING:
    from .compile_check import Build

WIDTHS, TOKENS = (3584, 2048), (4096, 16384, 65536)
"""D of the 7B and 3B models, and T, for which the bound is printed."""

LIMITS: dict[str, tuple[int, int]] = {
    "triton bf16 128x128x64 forward": (102, 1411),
    "triton bf16 128x128x64 forward, no db": (102, 1027),
    "triton bf16 128x128x64 loss only": (102, 889),
    "triton-tma bf16 256x128x64 forward": (97, 1792),
    "triton-tma bf16 256x128x64 forward, no db": (97, 1362),
    "triton-tma bf16 256x128x64 loss only": (97, 1114),
    "triton-tma-pair bf16 128x128x64 forward": (93, 1755),
    "triton-tma-pair bf16 128x128x64 forward, no db": (93, 1343),
    "triton-tma-pair bf16 128x128x64 loss only": (93, 1095),
    "triton-ws bf16 128x256x64 forward, no db": (60, 1636),
    "triton-ws bf16 128x256x64 loss only": (60, 1360),
    "triton fp16 128x128x64 forward": (102, 1367),
    "triton-tma fp16 256x128x64 forward": (97, 1713),
    "triton-tma-pair fp16 128x128x64 forward": (93, 1675),
    "triton-ws fp16 128x256x64 forward, no db": (60, 1537),
}
"""Configuration -> instructions per step of the main loop, and outside of it, as compiled by Triton `RECORDED_WITH`."""
RECORDED_WITH = "3.7.1"
_GROWTH = 1.05


@dataclass(frozen=True)
class Reading:
    """The machine code of one configuration for sm_90."""

    name: str
    counts: Counts
    gemm: Gemm
    spilled: int
    """Bytes."""
    descriptors: bool
    """Whether its operands are loaded through tensor descriptors."""

    @property
    def problems(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.descriptors and not self.counts.tensor_loads:
            found.append(f"has no {TENSOR_LOAD}")
        if triton.__version__ != RECORDED_WITH:
            return found
        if self.name not in LIMITS:
            found.append("has no entry in LIMITS of kernels/sass_gate.py")
            return found
        parts = ("per step of the main loop", self.gemm.step), ("outside of it", self.gemm.exposed)
        for (part, instructions), limit in zip(parts, LIMITS[self.name], strict=True):
            if instructions > limit * _GROWTH:
                found.append(f"{instructions:.0f} instructions {part}, {limit} recorded")
        return found

    @property
    def row(self) -> str:
        gemm, verdict = self.gemm, "; ".join(self.problems)
        bounds = " ".join(f"{gemm.utilization(tokens, width):>5.3f}" for width in WIDTHS for tokens in TOKENS)
        return (
            f"{self.name:<48} {self.counts.matrix:>5} {self.counts.tensor_loads:>4} {gemm.step:>5.0f} {gemm.exposed:>7}"
            f" {gemm.registers:>5} {self.spilled:>6} {gemm.shared:>7} {gemm.programs:>4} {gemm.operand_bytes:>5.0f}"
            f"  {bounds}  {'REFUSED: ' + verdict if verdict else 'ok'}"
        )


def read(made: Build, listing: str) -> Reading:
    """The machine code `listing` of a GEMM compiled for sm_90; ValueError if none of its loops multiplies."""
    case, counts = made.case, count(listing)
    rows, columns, depth = (case.constants[size] for size in ("BLOCK_T", "BLOCK_D", "BLOCK_K"))
    multiplying = made.warps - (4 if case.warps_expected else 0)
    steps = counts.multiply_adds * multiplying / 4 / (rows * columns * depth)  # in one iteration of the loop
    return Reading(
        name=case.name,
        counts=counts,
        gemm=Gemm(
            rows=rows,
            columns=columns,
            depth=depth,
            step=counts.loop / steps,
            exposed=counts.before + counts.after,
            registers=made.registers,
            shared=made.shared,
            warps=made.warps,
            multiplying=multiplying,
        ),
        spilled=made.spilled,
        descriptors=case.kernel is descriptor_kernel,
    )


def header() -> str:
    """Two lines above the rows."""
    limits = "" if triton.__version__ == RECORDED_WITH else f"; limits are those of Triton {RECORDED_WITH}: not applied"
    columns = " ".join(f"{f'{tokens // 1024}k':>5}" for _ in WIDTHS for tokens in TOKENS)
    widths = " ".join(f"{f'D {width}':<17}" for width in WIDTHS)
    return (
        f"machine code for sm_90; bounds are predicted, not measured{limits}\n{'':<103}  {widths}\n"
        f"{'':<48} {'HGMMA':>5} {'TMA':>4} {'step':>5} {'outside':>7} {'regs':>5} {'spill':>6} {'shared':>7}"
        f" {'per SM':>6} {'L2':>3}  {columns}"
    )
