"""Every kernel compiles for GPUs without having them, does not spill and fits; other configurations are rejected."""

import os
import subprocess
import sys

import pytest

from bifrost.kernels import compile_check

COMPILED = {**os.environ, "TRITON_INTERPRET": "0"}

PLANTED = """
from dataclasses import replace
from bifrost.kernels.compile_check import build, cases
case = cases()[0]
large = replace(case, constants={**case.constants, "BLOCK_D": 256, "SLICES": 1}, warps=4)
print(build(large, 90).problems)
deep = replace(case, stages=9)
print(build(deep, 90).problems)
"""

LOST = """
from dataclasses import replace
from bifrost.kernels.compile_check import build, cases
case = next(case for case in cases() if case.name.startswith("triton-ws") and case.arches == (90,))
print(build(case, 90).problems)
print(build(replace(case, warps=8), 90).problems)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=COMPILED)


@pytest.mark.slow
def test_every_kernel_compiles_and_fits() -> None:
    ended = run("-m", "bifrost.kernels.compile_check")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    builds, code = ended.stdout.split("\n\n")
    _, *lines = builds.splitlines()
    assert len(lines) >= 50
    assert all(line.endswith("ok") for line in lines)
    assert {arch for line in lines for arch in ("sm_80", "sm_90", "sm_100") if arch in line} == {
        "sm_80",
        "sm_90",
        "sm_100",
    }
    title, _, _, *rows = code.splitlines()
    assert "predicted, not measured" in title
    assert len(rows) == sum("sm_90 " in line and "triton" in line and "fp32" not in line for line in lines)
    assert all(row.endswith("ok") for row in rows)


def test_cases_for_newer_triton_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    built = []

    def build(case: compile_check.Case, arch: int) -> compile_check.Build:
        built.append(case.name)
        return compile_check.Build(case, arch, 1, 0, 0, case.warps_expected or case.warps, 1)

    monkeypatch.setattr(compile_check, "build", build)
    monkeypatch.setattr(compile_check, "check_machine_code", lambda gemms: 0)
    for version, fits in (("3.6.0", False), ("3.7.0", True)):
        built.clear()
        monkeypatch.setattr(compile_check.triton, "__version__", version)
        assert compile_check.main() == 0
        assert any(name.startswith("triton-ws") for name in built) == fits
        assert ("left out: needs Triton 3.7, this is 3.6.0" in capsys.readouterr().out) != fits
    assert len(built) >= 50


@pytest.mark.slow
def test_spills_and_excessive_shared_memory_are_rejected() -> None:
    ended = run("-c", PLANTED)
    assert ended.returncode == 0, ended.stderr
    spilled, oversized = ended.stdout.splitlines()
    assert "spills" in spilled
    assert "shared memory" in oversized


@pytest.mark.slow
def test_lost_warp_specialization_is_rejected() -> None:
    """With eight warps, Triton's compiler silently drops the request for sm_90."""
    ended = run("-c", LOST)
    assert ended.returncode == 0, ended.stderr
    kept, eight = ended.stdout.splitlines()
    assert kept == "[]"
    assert "lost warp specialization: 8 warps, not 12" in eight
