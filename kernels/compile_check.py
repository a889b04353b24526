"""Compiles every kernel for GPUs that this machine need not have, and refuses configurations that spill or do not fit.

`python -m bifrost.kernels.compile_check`: Triton and its ptxas are enough. What a compiler cannot see, speed, races and
barriers, is not checked here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from . import latent_loss
from .runtime import INTERPRETED

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may use, by compute capability."""

MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""What a GEMM compiles to on each architecture; without it the kernel runs on the wrong units."""


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    """Arguments that the launcher would find divisible by 16."""
    warps: int
    stages: int
    matrix: bool
    """Whether it is a GEMM."""


@dataclass(frozen=True)
class Build:
    """What one configuration takes on one architecture; bytes, except registers a thread and counts."""

    case: Case
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int
    matrix_instructions: int

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMITS[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory, {SHARED_LIMITS[self.arch]} fit")
        if self.case.matrix and not self.matrix_instructions:
            found.append(f"has no {MATRIX_INSTRUCTIONS[self.arch]}")
        return found


def cases() -> list[Case]:
    """Every kernel in every configuration that a run can choose."""
    import triton.language as tl

    found = []
    block_t, block_d, block_k, group, warps, stages = latent_loss.TILES
    for dtype in ("bf16", "fp16"):
        for keep in (True, False):
            pointers = ("hidden", "weight", "bias", "target", "residual")
            strides = ("stride_hidden", "stride_weight", "stride_target")
            found.append(
                Case(
                    name=f"latent_loss {dtype} {block_t}x{block_d}x{block_k} {'forward' if keep else 'loss only'}",
                    kernel=latent_loss._residual_kernel,
                    signature={
                        **dict.fromkeys(pointers, f"*{dtype}"),
                        **dict.fromkeys(("token_weight", "partials"), "*fp32"),
                        **dict.fromkeys(("T", "K", "D", *strides), "i32"),
                    },
                    constants={
                        "HAS_BIAS": True,
                        "STORE": keep,
                        "ACCUMULATE": tl.float32,
                        "UPCAST": False,
                        "BLOCK_T": block_t,
                        "BLOCK_D": block_d,
                        "BLOCK_K": block_k,
                        "GROUP": group,
                    },
                    aligned=(*pointers, "token_weight", "partials", "K", "D", *strides),
                    warps=warps,
                    stages=stages,
                    matrix=True,
                )
            )
    return found


def build(case: Case, arch: int) -> Build:
    """Compile `case` for compute capability `arch` / 10 and read what ptxas says of it."""
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached build prints no resources
        options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
        compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptxas = log.getvalue()
    return Build(
        case=case,
        arch=arch,
        registers=_number(r"Used (\d+) registers", ptxas),
        spilled=_number(r"(\d+) bytes spill stores", ptxas),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        matrix_instructions=compiled.asm["ptx"].count(MATRIX_INSTRUCTIONS[arch]),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas printed nothing like {pattern!r}: {text[:200]!r}")
    return int(found[1])


def main() -> int:
    """Print a line a build; 1 when one is refused."""
    print(f"{'kernel':<44} {'target':>6} {'regs':>5} {'spill':>6} {'shared':>8} {'warps':>6} {'matrix':>7}")
    refused = 0
    for case in cases():
        for arch in SHARED_LIMITS:
            made = build(case, arch)
            verdict = "; ".join(made.problems)
            refused += bool(verdict)
            print(
                f"{case.name:<44} {'sm_' + str(arch):>6} {made.registers:>5} {made.spilled:>6} {made.shared:>8}"
                f" {made.warps:>6} {made.matrix_instructions:>7}  {'REFUSED: ' + verdict if verdict else 'ok'}"
            )
    return 1 if refused else 0


if __name__ == "__main__":
    if INTERPRETED:  # chosen when the package was imported: start again, to compile instead
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        os.execve(sys.executable, [sys.executable, "-m", "bifrost.kernels.compile_check"], environment)
    sys.exit(main())
