"""Compiles every kernel for GPUs that this machine need not have, and refuses configurations that spill or do not fit.

`python -m bifrost.kernels.compile_check`: Triton and its ptxas are enough. What a compiler cannot see, speed, races and
barriers, is not checked here.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from . import gather_norm, latent_loss, mask_mix
from .runtime import INTERPRETED, tl, triton

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
    """Every kernel in every configuration that a run can choose, at the widths of the 3B and 7B models."""
    found = []
    block_t, block_d, block_k, group, warps, stages = latent_loss.TILES
    for dtype, keep in itertools.product(("bf16", "fp16"), (True, False)):
        found.append(
            _case(
                f"latent_loss {dtype} {block_t}x{block_d}x{block_k} {'forward' if keep else 'loss only'}",
                latent_loss._residual_kernel,
                {"hidden weight bias target residual": f"*{dtype}", "token_weight partials": "*fp32", "T": "i32"},
                "K D stride_hidden stride_weight stride_target",
                {"HAS_BIAS": True, "STORE": keep, "UPCAST": False, "BLOCK_T": block_t, "BLOCK_D": block_d}
                | {"BLOCK_K": block_k, "GROUP": group},
                warps,
                stages,
                matrix=True,
            )
        )
    block_n, block_d, warps = mask_mix.TILES
    for table in (True, False):
        positions = {"positions": "*bf16"} if table else {}
        found.append(
            _case(
                f"mask_mix bf16 forward{', table' if table else ''}",
                mask_mix._forward_kernel,
                {"latents token mixed": "*bf16", "mask": "*i1", "ROWS N": "i32", **positions},
                "D stride_sample stride_patch stride_position",
                {"HAS_POSITIONS": table, "BLOCK_N": block_n, "BLOCK_D": block_d}
                | ({} if table else {"positions": None}),
                warps,
            )
        )
    found.append(
        _case(
            "mask_mix bf16 backward",
            mask_mix._backward_kernel,
            {"gradient d_latents": "*bf16", "d_positions partials": "*fp32", "mask": "*i1", "B N": "i32"},
            "D stride_sample stride_patch",
            {"NEED_LATENTS": True, "NEED_TOKEN": True, "NEED_POSITIONS": True, "BLOCK_N": block_n, "BLOCK_D": block_d},
            warps,
        )
    )
    for width in (2048, 3584):
        block_d = triton.next_power_of_2(width)
        warps = gather_norm._warps(block_d)
        found.append(
            _case(
                f"gather_norm bf16 {width} forward",
                gather_norm._forward_kernel,
                {"hidden weight output": "*bf16", "rows": "*i64", "eps": "fp32"},
                "D stride_hidden",
                {"BLOCK_D": block_d},
                warps,
            )
        )
        found.append(
            _case(
                f"gather_norm bf16 {width} backward",
                gather_norm._backward_kernel,
                {"gradient hidden weight d_hidden": "*bf16", "rows": "*i64", "R": "i32"}
                | {"partials": "*fp32", "eps": "fp32"},
                "D stride_gradient stride_hidden",
                {"NEED_HIDDEN": True, "NEED_WEIGHT": True, "BLOCK_R": gather_norm.BLOCK_R, "BLOCK_D": block_d},
                warps,
            )
        )
    return found


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    divisible: str,
    constants: dict[str, Any],
    warps: int,
    stages: int = 3,
    matrix: bool = False,
) -> Case:
    """types: names, spaces between, -> Triton type; divisible: integers that are multiples of 16, as pointers are."""
    signature = {argument: kind for names, kind in types.items() for argument in names.split()}
    signature |= dict.fromkeys(divisible.split(), "i32")
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    constants = {"ACCUMULATE": tl.float32, **constants}
    return Case(name, kernel, signature, constants, (*pointers, *divisible.split()), warps, stages, matrix)


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
