"""Benchmark cases: inputs, candidates, their exact result, the minimum work, and floors for its time.

Legend: T tokens, D width, e bytes per element, R selected rows, N patches of an image.

Work is the minimum of the operation for any implementation: every input is read once by each pass that uses it, every
output is written once. One multiply-add is two FLOPs; elementwise work of a GEMM kernel is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import gather_norm
from ..gather_norm import gather_rms_norm
from ..mask_mix import TILES, mask_mix
from ..mask_mix import Provider as MixProvider
from ..runtime import INTERPRETED

Mode = Literal["forward", "backward", "full", "no-grad"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""`forward`: with tensors saved for backward; `backward`: alone; `full`: both; `no-grad`: the result alone."""

PATCHES = 256
"""Patches of an image in Bifrost-1."""
EPS = 1e-6
"""Epsilon of Qwen2.5-VL's norms."""


class Shape(NamedTuple):
    model: str
    """`3b`, `7b`, or empty for another width."""
    width: int
    heads: int
    groups: int
    """Key and value heads."""


SHAPES = {"3b": Shape("3b", 2048, 16, 2), "7b": Shape("7b", 3584, 28, 4)}


class Work(NamedTuple):
    flops: int
    bytes: int

    def __add__(self, other: tuple[int, ...]) -> Work:  # type: ignore[override]
        return Work(self.flops + other[0], self.bytes + other[1])


class Floor(NamedTuple):
    call: Callable[[], object]
    scale: float = 1.0
    """Floor time divided by the time of `call`, which may be of a slightly different size."""


def restored(output: Any, gradients: list[Tensor]) -> list[Tensor]:
    return [output, *gradients]


@dataclass(frozen=True)
class Candidate:
    """One implementation of the operation, on inputs in its own layout."""

    provider: str
    baseline: bool
    """Not part of bifrost.kernels."""
    call: Callable[[], Any]
    """Forward pass: the result, or a tuple whose first element is differentiated."""
    leaves: tuple[Tensor, ...]
    gradient: Tensor
    """Gradient of the result, for the backward pass."""
    restore: Callable[[Any, list[Tensor]], list[Tensor]] = restored
    """(result, gradients of the leaves) -> tensors that are compared with the exact values."""
    config: str = ""
    """Tile sizes of our kernels."""


@dataclass
class Problem:
    """One kernel at one size."""

    kernel: str
    shape: Shape
    tokens: int
    candidates: list[Candidate]
    skipped: dict[str, str]
    """Provider -> why it cannot run."""
    exact: Callable[[], list[Tensor]]
    """Result and gradients in fp64."""
    work: dict[Mode, Work]
    floors: Callable[[Mode], list[Floor]]
    """The longest of these is the floor; created when measured."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further parameters that distinguish configurations."""


Wanted = Callable[[str], bool]
Builder = Callable[[Shape, int, torch.dtype, torch.device, Wanted], Problem]


def random_tensors(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=draw, device=device, dtype=dtype)


NOT_COMPILED = "Triton is not compiled here, and the interpreter's time is not comparable to a GPU's"


def not_compiled(device: torch.device) -> str | None:
    """Why Triton kernels are not timed on `device`; None if they are."""
    return None if device.type == "cuda" and not INTERPRETED else NOT_COMPILED


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Cached sizes would reach the recompile limit, after which eager code would be timed.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def copy_floor(count: int, device: torch.device) -> Floor:
    """A device copy that moves `count` bytes, half read and half written."""
    half = max(count // 2, 1)
    source, sink = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    return Floor(lambda: sink.copy_(source), count / (2 * half))


def gemm_floor(flops: int, dtype: torch.dtype, device: torch.device) -> Floor:
    """A square GEMM of about `flops` FLOPs, with sides in multiples of 64."""
    side = max(round((flops / 2) ** (1 / 3) / 64), 1) * 64
    normal = random_tensors(device, dtype)
    left, right = normal(side, side), normal(side, side)
    return Floor(lambda: torch.mm(left, right), flops / (2 * side**3))


def _in_fp64(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], gradient: Tensor) -> list[Tensor]:
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output = function(*doubles)
    return [output.detach(), *torch.autograd.grad(output, doubles, gradient.double())]


@dataclass(frozen=True)
class Operation:
    """A memory-bound kernel and its inputs. call(*leaves, provider): the result; work: per pass."""

    kernel: str
    config: str
    call: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    gradient: Tensor
    work: dict[Mode, Work]


def _memory_bound(operation: Operation, shape: Shape, tokens: int, device: torch.device, wanted: Wanted) -> Problem:
    """Plain PyTorch as baseline, compiled, and the Triton kernel. Floors are copies."""
    candidates, skipped = [], {}
    leaves, gradient, passes = operation.leaves, operation.gradient, operation.work

    def plain(*inputs: Tensor) -> Tensor:
        return operation.call(*inputs, "reference")

    if wanted("eager"):
        candidates.append(Candidate("eager", True, lambda: plain(*leaves), leaves, gradient))
    if wanted("compile"):
        fast = compiled(plain)
        candidates.append(Candidate("compile", True, lambda: fast(*leaves), leaves, gradient))
    if wanted("triton"):
        if reason := not_compiled(device):
            skipped["triton"] = reason
        else:
            call = lambda: operation.call(*leaves, "triton")  # noqa: E731
            candidates.append(Candidate("triton", False, call, leaves, gradient, config=operation.config))
    work: dict[Mode, Work] = {**passes, "full": passes["forward"] + passes["backward"], "no-grad": passes["forward"]}
    return Problem(
        operation.kernel,
        shape,
        tokens,
        candidates,
        skipped,
        lambda: _in_fp64(plain, leaves, gradient),
        work,
        lambda mode: [copy_floor(work[mode].bytes, device)],
    )


def mask_mix_work(tokens: int, masked: int, width: int, itemsize: int) -> dict[Mode, Work]:
    """Masked latents are not read. Latents come from a frozen encoder and get no gradient; token and table do."""
    table, token = PATCHES * width * itemsize, width * itemsize
    rows = width * itemsize
    return {
        "forward": Work(tokens * width, (tokens - masked + tokens) * rows + tokens + table + token),
        "backward": Work((tokens + masked) * width, tokens * rows + tokens + table + token),
    }


def mask_mix_problem(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, wanted: Wanted) -> Problem:
    """Images of 256 patches, half of them masked on average."""
    samples, normal = tokens // PATCHES, random_tensors(device, dtype)
    latents, mask = normal(samples, PATCHES, shape.width), normal(samples, PATCHES) > 0
    leaves = normal(1, 1, shape.width).requires_grad_(), normal(1, PATCHES, shape.width).requires_grad_()

    def operation(token: Tensor, table: Tensor, provider: MixProvider) -> Tensor:
        return mask_mix(latents.to(token.dtype), mask, token, table, provider)

    rows, columns, warps = TILES
    passes = mask_mix_work(tokens, int(mask.sum()), shape.width, latents.element_size())
    config = f"rows={rows} columns={columns} warps={warps}"
    gradient = normal(samples, PATCHES, shape.width)
    made = Operation("mask-mix", config, operation, leaves, gradient, passes)
    return _memory_bound(made, shape, tokens, device, wanted)


def gather_norm_work(tokens: int, selected: int, width: int, itemsize: int) -> dict[Mode, Work]:
    """Forward reads and writes the selected rows; backward reads them and their gradient, and writes all T rows."""
    rows, index = selected * width * itemsize, 8 * selected
    weight = width * itemsize
    return {
        "forward": Work(4 * selected * width, 2 * rows + index + weight),
        "backward": Work(11 * selected * width, 2 * rows + tokens * width * itemsize + index + 2 * weight),
    }


def gather_norm_problem(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, wanted: Wanted) -> Problem:
    """Half of the rows, in order."""
    normal = random_tensors(device, dtype)
    leaves = normal(tokens, shape.width).requires_grad_(), normal(shape.width).requires_grad_()
    half = math.ceil(tokens / 2)
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:half].sort().values.to(device)

    def operation(hidden: Tensor, weight: Tensor, provider: gather_norm.Provider) -> Tensor:
        return gather_rms_norm(hidden, rows, weight, EPS, provider)

    passes = gather_norm_work(tokens, half, shape.width, leaves[0].element_size())
    config, gradient = f"rows={gather_norm.BLOCK_R}", normal(half, shape.width)
    made = Operation("gather-norm", config, operation, leaves, gradient, passes)
    problem = _memory_bound(made, shape, tokens, device, wanted)
    if wanted("liger"):
        found = not_compiled(device) or _liger_norm()
        if isinstance(found, str):
            problem.skipped["liger"] = found
        else:
            call = lambda: found(leaves[0].index_select(0, rows), leaves[1], EPS, 0.0, "llama", False)  # noqa: E731
            problem.candidates.append(Candidate("liger", True, call, leaves, gradient))
    return problem


def _liger_norm() -> Callable[..., Tensor] | str:
    """Liger's RMSNorm, which after an index_select is the same operation; or why it is unavailable."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    except Exception as error:  # such packages fail in many ways with another Triton
        return f"liger_kernel cannot be imported ({type(error).__name__}: {error})"
    return LigerRMSNormFunction.apply
