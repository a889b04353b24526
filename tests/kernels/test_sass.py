"""Machine code: instructions of the main loop and outside of it, and configurations whose code got worse.

`main_loop.sass` is of the latent-loss GEMM with tiles of 128x128x64, as compiled for sm_90 with eight warps; most
instructions ahead of and after its main loop are left out.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bifrost.kernels import compile_check, sass, sass_gate
from bifrost.kernels.latent_loss_triton import descriptor_kernel

LISTING = Path(__file__).with_name("main_loop.sass").read_text()
NAME = "triton-tma bf16 128x128x64 forward"


def built(**changes: Any) -> compile_check.Build:
    size = {"BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_K": 64}
    case = compile_check.Case(NAME, descriptor_kernel, {}, size, (), warps=8, stages=3, matrix=True)
    resources: dict[str, Any] = {"registers": 125, "spilled": 0, "shared": 98328, "warps": 8, "matrix_instructions": 4}
    return compile_check.Build(case, 90, **(resources | changes))


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of this listing, whatever Triton is installed."""
    monkeypatch.setattr(sass_gate, "LIMITS", {NAME: (83, 19)})
    monkeypatch.setattr(sass_gate, "triton", SimpleNamespace(__version__=sass_gate.RECORDED_WITH))


def test_parts_of_a_kernel_are_counted() -> None:
    """An instruction has 16 bytes, so that its number follows from the addresses in the listing."""
    counts = sass.count(LISTING)
    assert counts.loop == (0x1580 - 0x1060) // 16 + 1
    assert counts.before == 3 + (0x1050 - 0x1020) // 16 + 1, "three at the entry, then those up to the loop"
    assert counts.after == 2 + (0x5B30 - 0x5AA0) // 16 + 1, "up to EXIT, without the wait that is retried below it"
    assert (counts.matrix, counts.tensor_loads) == (4, 2)
    assert counts.multiply_adds == 64 * 128 * 64, "half of a tile: the other warp group multiplies its other rows"


def test_kernel_without_problems() -> None:
    reading = sass_gate.read(built(), LISTING)
    assert reading.problems == []
    assert (reading.gemm.step, reading.gemm.exposed, reading.gemm.programs) == (83, 19, 2)
    assert reading.row.endswith("  ok")


def test_loop_that_takes_two_steps() -> None:
    """Twice as many matrix instructions in the loop: it is unrolled, and a step takes half of its instructions."""
    line = next(line for line in LISTING.splitlines() if "gsb0 ;" in line)
    unrolled = LISTING.replace(line, "\n".join([line] * 5))
    assert sass_gate.read(built(), unrolled).gemm.step == (83 + 4) / 2


def test_no_matrix_instruction_in_a_loop() -> None:
    with pytest.raises(ValueError, match="no loop has HGMMA"):
        sass_gate.read(built(), LISTING.replace("HGMMA.64x128x16", "HMMA.16816"))
    straight = "\n".join(line for line in LISTING.splitlines() if "BRA" not in line)
    with pytest.raises(ValueError, match="no loop has HGMMA"):
        sass_gate.read(built(), straight)


def test_worse_code_is_refused() -> None:
    assert sass_gate.read(built(spilled=8), LISTING).problems == ["spills 8 bytes"]
    pointers = LISTING.replace("UTMALDG.2D", "LDGSTS.E")
    assert sass_gate.read(built(), pointers).problems == ["has no UTMALDG"]
    bar = next(line for line in LISTING.splitlines() if "/*1560*/" in line)
    longer = LISTING.replace(bar, "\n".join([bar] * 6))
    assert sass_gate.read(built(), longer).problems == ["88 instructions per step of the main loop, 83 recorded"]
    within = LISTING.replace(bar, "\n".join([bar] * 5))
    assert sass_gate.read(built(), within).problems == [], "87 are less than 5 % more"
    end = next(line for line in LISTING.splitlines() if "STG.E" in line)
    epilogue = LISTING.replace(end, "\n".join([end] * 2))
    reading = sass_gate.read(built(), epilogue)
    assert reading.problems == ["20 instructions outside of it, 19 recorded"]
    assert reading.row.endswith("REFUSED: 20 instructions outside of it, 19 recorded")


def test_limits_are_those_of_one_version_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass_gate, "LIMITS", {})
    assert sass_gate.read(built(), LISTING).problems == ["has no entry in LIMITS of kernels/sass_gate.py"]
    monkeypatch.setattr(sass_gate, "triton", SimpleNamespace(__version__="3.6.0"))
    assert sass_gate.read(built(), LISTING).problems == []
    assert sass_gate.read(built(spilled=8), LISTING).problems == ["spills 8 bytes"]
    assert f"limits are those of Triton {sass_gate.RECORDED_WITH}: not applied" in sass_gate.header()


def test_missing_disassembler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sass, "triton", SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="3.7.1"))
    assert compile_check.main() == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("Triton 3.7.1 has no nvdisasm in ")


def test_code_that_is_not_machine_code() -> None:
    with pytest.raises(RuntimeError, match="nvdisasm failed"):
        sass.disassemble(b"not machine code")


def test_table_lists_refusals(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = iter([LISTING, LISTING.replace("HGMMA", "HMMA")])
    monkeypatch.setattr(sass, "disassemble", lambda cubin: next(listings))
    assert compile_check.check_machine_code([built(), built()]) == 1
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  ok")
    assert second.split() == [*NAME.split(), "REFUSED:", "no", "loop", "has", "HGMMA"]
