"""Compile every kernel for several GPUs, without needing one, and reject configurations that spill or do not fit.

`python -m bifrost.kernels.compile_check`: needs only Triton with its ptxas and nvdisasm. The GEMMs' machine code for
sm_90 is read as well: `sass_gate`. Does not check what a compiler cannot see: speed, races and barriers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from . import sass, sass_gate
from .errors import first_line
from .gather_norm import BLOCK_R
from .gather_norm import _backward_kernel as norm_backward
from .gather_norm import _forward_kernel as norm_forward
from .gather_norm import _warps as norm_warps
from .latent_loss import halves_epilogue
from .latent_loss_triton import descriptor_kernel, inplace_kernel, pointer_kernel, tiles
from .mask_mix import TILES as MIX_TILES
from .mask_mix import _backward_kernel as mix_backward
from .mask_mix import _forward_kernel as mix_forward
from .runtime import INTERPRETED, tl, triton

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory available to one program, by compute capability."""

MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Instruction that a GEMM compiles to on each architecture; without it the kernel does not use tensor cores."""


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    """Arguments that the launcher treats as divisible by 16."""
    warps: int
    stages: int
    matrix: bool = False
    """Whether it is a GEMM on tensor cores."""
    arches: tuple[int, ...] = tuple(SHARED_LIMITS)
    warps_expected: int | None = None
    """Warps of a warp-specialized program, including those that load; the compiler may silently drop the request."""


@dataclass(frozen=True)
class Build:
    """Resources of one configuration on one architecture: registers per thread, bytes, and counts."""

    case: Case
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int
    matrix_instructions: int
    cubin: bytes = field(default=b"", repr=False)
    """The machine code."""

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMITS[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory, {SHARED_LIMITS[self.arch]} fit")
        if self.case.matrix and not self.matrix_instructions:
            found.append(f"has no {MATRIX_INSTRUCTIONS[self.arch]}")
        if self.case.warps_expected not in (None, self.warps):
            found.append(f"lost warp specialization: {self.warps} warps, not {self.case.warps_expected}")
        return found


def cases() -> list[Case]:
    """Every kernel in every configuration that a run can use, at the widths of the 3B and 7B models."""
    found = _latent_loss_cases()
    block_n, block_d, warps = MIX_TILES
    for table in (True, False):
        positions = {"positions": "*bf16"} if table else {}
        found.append(
            _case(
                f"mask_mix bf16 forward{', table' if table else ''}",
                mix_forward,
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
            mix_backward,
            {"gradient d_latents": "*bf16", "d_positions partials": "*fp32", "mask": "*i1", "B N": "i32"},
            "D stride_sample stride_patch",
            {"NEED_LATENTS": True, "NEED_TOKEN": True, "NEED_POSITIONS": True, "BLOCK_N": block_n, "BLOCK_D": block_d},
            warps,
        )
    )
    for width in (2048, 3584):
        block_d = int(triton.next_power_of_2(width))
        warps = norm_warps(block_d)
        found.append(
            _case(
                f"gather_norm bf16 {width} forward",
                norm_forward,
                {"hidden weight output": "*bf16", "rows": "*i64", "eps": "fp32"},
                "D stride_hidden",
                {"BLOCK_D": block_d},
                warps,
            )
        )
        found.append(
            _case(
                f"gather_norm bf16 {width} backward",
                norm_backward,
                {"gradient hidden weight d_hidden": "*bf16", "rows": "*i64", "R": "i32"}
                | {"partials": "*fp32", "eps": "fp32"},
                "D stride_gradient stride_hidden",
                {"NEED_HIDDEN": True, "NEED_WEIGHT": True, "BLOCK_R": BLOCK_R, "BLOCK_D": block_d},
                warps,
            )
        )
    return found


TMA = ("triton-tma", "triton-tma-pair")
"""Providers that get tensor descriptors from the host."""

_LOSS_MODES = {"forward": (True, True), "forward, no db": (True, False), "loss only": (False, False)}
"""Whether d and its column sums are stored."""


def _latent_loss_cases() -> list[Case]:
    """The kernel of every provider; the warp-specialized one never sums columns itself."""
    found: list[tuple[str, str, str]] = [
        *itertools.product(("triton", *TMA), ("bf16",), _LOSS_MODES),
        *itertools.product(("triton-ws",), ("bf16",), ("forward, no db", "loss only")),
        *itertools.product(("in-place",), ("bf16",), ("forward", "loss only")),
        *itertools.product(("triton", *TMA, "in-place"), ("fp16",), ("forward",)),
        ("triton-ws", "fp16", "forward, no db"),
        ("triton", "fp32", "forward"),
    ]
    apart = ((90,), (100,))  # with tiles of their own
    arches = {"triton-tma": apart, "triton-tma-pair": ((90, 100),), "triton-ws": apart}
    return [_latent_loss_case(*case, some) for case in found for some in arches.get(case[0], ((80, 90, 100),))]


def _latent_loss_case(provider: str, dtype: str, mode: str, arches: tuple[int, ...]) -> Case:
    tile = tiles(provider, 4 if dtype == "fp32" else 2, arches[0] // 10)
    store, sum_columns = _LOSS_MODES[mode]
    types = {"target": f"*{dtype}", "token_weight row_sums column_sums": "*fp32", "T": "i32"}
    constants = {"STORE": store, "SUM_COLUMNS": sum_columns, "BLOCK_T": tile.rows, "BLOCK_D": tile.columns}
    name = f"{provider} {dtype} {tile.rows}x{tile.columns}"
    if provider == "in-place":
        types["prediction"] = f"*{dtype}"
        return _case(f"{name} {mode}", inplace_kernel, types, "D stride_target", constants, tile.warps)
    types["bias"] = types["residual"] = f"*{dtype}"
    constants |= {"HAS_BIAS": True, "UPCAST": False, "BLOCK_K": tile.depth, "GROUP": tile.group, "SLICES": tile.slices}
    if provider in TMA:
        types["hidden"] = f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>"
        types["target"] = f"tensordesc<{dtype}[{tile.rows},{tile.columns // tile.slices}]>"
        types["residual"] = types["target"] if store else types["residual"]
    else:
        types["hidden weight"] = f"*{dtype}"
    if provider != "triton":
        constants["WARP_SPECIALIZE"] = provider == "triton-ws"
    case = _case(
        f"{name}x{tile.depth} {mode}",
        pointer_kernel if provider == "triton" else descriptor_kernel,
        types,
        "K D stride_hidden stride_weight stride_target",
        constants,
        tile.warps,
        tile.stages,
    )
    warps = 12 if provider == "triton-ws" else None  # four load, eight multiply
    return replace(case, matrix=dtype != "fp32", arches=arches, warps_expected=warps)


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    divisible: str,
    constants: dict[str, Any],
    warps: int,
    stages: int = 3,
) -> Case:
    """types: space-separated names -> Triton type. divisible: integers that are multiples of 16, as pointers are."""
    signature = {argument: kind for names, kind in types.items() for argument in names.split()}
    signature |= dict.fromkeys(divisible.split(), "i32")
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    constants = {"ACCUMULATE": tl.float32, **constants}
    aligned = (*pointers, *divisible.split())
    return Case(name, kernel, signature, constants, aligned, warps, stages)


def build(case: Case, arch: int) -> Build:
    """Compile `case` for compute capability `arch` / 10 and read ptxas's report."""
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
        cubin=compiled.asm["cubin"],
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas printed nothing like {pattern!r}: {text[:200]!r}")
    return int(found[1])


def main() -> int:
    """Print the number of builds and a line per build as it finishes, then a line per GEMM's machine code for sm_90.

    Returns 1 when one is refused, 2 without a disassembler.
    """
    try:
        sass.disassembler()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(len(case.arches) for case in cases())
    print(
        f"{f'{total} builds':<48} {'target':>6} {'regs':>5} {'spill':>6} {'shared':>8} {'warps':>6} {'matrix':>7}",
        flush=True,
    )
    refused, gemms = 0, []
    for case in cases():
        for arch in case.arches:
            label = f"{case.name:<48} {'sm_' + str(arch):>6}"
            if case.name.startswith("triton-ws") and not halves_epilogue():
                print(f"{label}  left out: needs Triton 3.7, this is {triton.__version__}", flush=True)
                continue
            try:
                made = build(case, arch)
            except Exception as error:  # any error of the compiler: the other cases are still checked
                refused += 1
                print(f"{label}  REFUSED: does not compile: {first_line(error)}", flush=True)
                continue
            if case.matrix and arch == 90:
                gemms.append(made)
            verdict = "; ".join(made.problems)
            refused += bool(verdict)
            print(
                f"{label} {made.registers:>5} {made.spilled:>6} {made.shared:>8}"
                f" {made.warps:>6} {made.matrix_instructions:>7}  {'REFUSED: ' + verdict if verdict else 'ok'}",
                flush=True,
            )
    return 1 if refused + check_machine_code(gemms) else 0


def check_machine_code(gemms: list[Build]) -> int:
    """Print what the machine code of every GEMM contains; returns the number of those refused."""
    refused = 0
    print(f"\n{sass_gate.header()}", flush=True)
    for made in gemms:
        try:
            reading = sass_gate.read(made, sass.disassemble(made.cubin))
        except (RuntimeError, ValueError) as error:
            refused += 1
            print(f"{made.case.name:<48} REFUSED: {first_line(error)}", flush=True)
            continue
        refused += bool(reading.problems)
        print(reading.row, flush=True)
    return refused


if __name__ == "__main__":
    if INTERPRETED:  # set when the package was imported: restart without the interpreter
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        os.execve(sys.executable, [sys.executable, "-m", "bifrost.kernels.compile_check"], environment)
    sys.exit(main())
