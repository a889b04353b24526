"""The bound on the use of tensor cores, computed by hand from the documented model."""

from dataclasses import replace

import pytest

from bifrost.kernels.static_bound import Gemm

LARGE = Gemm(128, 256, 64, step=88, exposed=2000, registers=212, shared=147480, warps=8, multiplying=8)
SMALL = Gemm(128, 128, 64, step=80, exposed=1500, registers=127, shared=98328, warps=8, multiplying=8)


@pytest.mark.parametrize(
    ("gemm", "programs"),
    [
        (LARGE, 1),
        (SMALL, 2),
        (replace(SMALL, registers=129), 1),  # 136 x 512 threads do not fit into 65,536 registers
        (replace(SMALL, shared=116 * 1024), 1),  # and 1 KiB for the system: two need 234 KiB of 228
        (replace(SMALL, shared=113 * 1024), 2),
        (replace(SMALL, registers=16, shared=1024), 8),  # 64 warps
    ],
)
def test_programs_per_multiprocessor(gemm: Gemm, programs: int) -> None:
    assert gemm.programs == programs


def test_one_program_waits_for_its_epilogue() -> None:
    """128 x 256 x 2048 at 2048 products per cycle is 32,768 cycles; 2,000 instructions of eight warps, 4 per cycle."""
    waves = 8  # 128 x 8 tiles on 132 multiprocessors: 7.76
    used = 128 * 8 / 132 * 32768 / (waves * (32768 + 2000 * 8 / 4))
    assert LARGE.utilization(16384, 2048) == pytest.approx(used)


def test_two_programs_overlap_all_epilogues_but_the_last() -> None:
    """With 8 warps; the operands of 128 x 128 tiles need all of the 64 bytes per cycle, the target some more."""
    tiles = 7  # 32 x 28 tiles on 132 multiprocessors: 6.79
    reads = tiles * (256 * 3584 * 2 + 128 * 128 * 2) / 64
    computes = tiles * 128 * 128 * 3584 / 2048 + 1500 * 8 / 4
    assert reads > computes
    assert SMALL.utilization(4096, 3584) == pytest.approx(32 * 28 / 132 * 28672 / reads)
    computes = 4 * 16384 + 3000  # 32 x 16 tiles, four per multiprocessor; reading them takes 67,584 cycles
    assert SMALL.utilization(4096, 2048) == pytest.approx(32 * 16 / 132 * 16384 / computes)
    one = 16384 + 3000  # one tile per multiprocessor: nothing overlaps
    assert SMALL.utilization(128 * 8, 2048) == pytest.approx(8 * 16 / 132 * 16384 / one)


def test_too_many_instructions_bound_the_main_loop() -> None:
    """1,024 cycles of the tensor cores per step; eight warps with 1,000 instructions take 2,000."""
    slow = replace(LARGE, step=1000, exposed=0)
    assert slow.utilization(132 * 128, 256) == pytest.approx(4 * 1024 / (4 * 2000 + 128 * 256 * 2 / 64))


def test_operands_per_cycle() -> None:
    """(128 + 256) x 64 numbers of 2 bytes in 1,024 cycles; (128 + 128) x 64 in 512."""
    assert (LARGE.operand_bytes, SMALL.operand_bytes) == (48, 64)


def test_partial_tiles_take_as_long_as_others() -> None:
    assert LARGE.utilization(129, 256) == pytest.approx(129 / 128 * LARGE.utilization(128, 256))
