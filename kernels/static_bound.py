"""Upper bound on the use of the tensor cores by a GEMM and its epilogue, from its machine code: predicted only.

docs/kernels.md states the model and what it leaves out. Legend as in `latent_loss`: T tokens, D latents, K = D.
"""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200."""
_MULTIPLY_ADDS = 2048
"""Products of 16-bit numbers per cycle and multiprocessor: 989.4 TFLOP/s at 1.83 GHz."""
_SCHEDULERS = 4
"""Each issues one instruction of one warp per cycle."""
_PORT_BYTES = 64
"""That a multiprocessor reads from the L2 cache per cycle: assumed, no figure is published."""
_REGISTERS, _SHARED_BYTES, _WARPS = 64 * 1024, 228 * 1024, 64
"""Of a multiprocessor. A program also takes 1 KiB of shared memory for the system."""


@dataclass(frozen=True)
class Gemm:
    """One program of a kernel with its resources, and the instructions that one warp issues."""

    rows: int
    columns: int
    depth: int
    """K columns of a step of the main loop."""
    step: float
    """Instructions per step."""
    exposed: int
    """Instructions ahead of and after the main loop."""
    registers: int
    """Per thread."""
    shared: int
    """Bytes per program."""
    warps: int
    multiplying: int
    """Warps that multiply and run the epilogue; the others of a warp-specialized program only load."""

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(_REGISTERS // registers, _SHARED_BYTES // (self.shared + 1024), _WARPS // self.warps)

    @property
    def operand_bytes(self) -> float:
        """Bytes of 16-bit operands per cycle that a multiprocessor reads while its tensor cores never wait."""
        return 2 * (self.rows + self.columns) * self.depth / self._matrix(self.depth)

    def _matrix(self, width: int) -> float:
        """Cycles of the tensor cores for one tile."""
        return self.rows * self.columns * width / _MULTIPLY_ADDS

    def utilization(self, tokens: int, width: int) -> float:
        """Upper bound on the share of the cycles in which all tensor cores of the GPU work, at T tokens and K = D."""
        steps = -(-width // self.depth)
        matrix = self._matrix(steps * self.depth)
        main_issue = steps * self.step * self.warps / _SCHEDULERS
        end_issue = self.exposed * self.multiplying / _SCHEDULERS
        operands = 2 * (self.rows + self.columns) * steps * self.depth / _PORT_BYTES
        target = 2 * self.rows * self.columns / _PORT_BYTES
        main, end = max(matrix, main_issue, operands), max(end_issue, target)
        tiles = -(-tokens // self.rows) * -(-width // self.columns)
        busiest = -(-tiles // MULTIPROCESSORS)
        cycles = max(
            busiest * main + end,  # the epilogue of the last tile overlaps nothing
            busiest * (main_issue + end_issue),
            busiest * (operands + target),
            -(-busiest // self.programs) * (main + end),  # a program runs one after the other
        )
        return tokens * width * width / _MULTIPLY_ADDS / MULTIPROCESSORS / cycles
