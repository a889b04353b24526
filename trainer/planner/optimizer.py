"""The optimizer in a plan: its state, and what an update moves, exchanges and computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..optim.rules import RULES, Rule, in_eight_bits, orthogonalization_bytes, orthogonalization_flops, rounds
from .devices import Device
from .layout import shard_size
from .part import Part
from .traffic import Transfer


def state_bytes(parts: Sequence[Part], optimizer: str, ranks: int = 1) -> float:
    """Bytes of the optimizer's state per rank. parts: only trained ones count, here and below; optimizer: its name."""
    return sum(rule.state_bytes * shard_size(sizes, ranks) for rule, sizes in _by_rule(parts, optimizer))


def stored_bytes(parts: Sequence[Part], optimizer: str) -> int:
    """Bytes of the state in a checkpoint."""
    return sum(4 * len(rule.state) * sum(sizes) for rule, sizes in _by_rule(parts, optimizer))


def at_work_bytes(parts: Sequence[Part], optimizer: str, ranks: int) -> float:
    """The most bytes that an update needs per rank next to the gradients."""
    own = (rule.temporary * min(shard_size(sizes, ranks), rule.at_once) for rule, sizes in _by_rule(parts, optimizer))
    whole = max((orthogonalization_bytes(shape) for shape in _matrices(parts, optimizer)), default=0.0)
    return max(max(own, default=0.0), whole)


def exchanges(parts: Sequence[Part], optimizer: str, ranks: int) -> list[Transfer]:
    """What ranks exchange in an update: in each round a matrix in bf16 to each rank, and its slices back."""
    largest = _longest(parts, optimizer, ranks)
    if not largest or ranks == 1:
        return []
    elements = sum(rows * columns for rows, columns in largest)
    received = 2.0 * 2 * elements * (ranks - 1) / ranks
    return [Transfer("matrices for Muon", received, 2 * len(largest), ranks, "all", False)]


def update_s(parts: Sequence[Part], optimizer: str, ranks: int, device: Device) -> float:
    """Seconds of an update. The device must have `bf16_tflops`."""
    assert device.bf16_tflops is not None
    moved = 0.0
    for rule, sizes in _by_rule(parts, optimizer):
        # A device's figure is for AdamW.
        moved += (device.optimizer_bytes - RULES["adamw"].moved + rule.moved) * shard_size(sizes, ranks)
    flops = sum(orthogonalization_flops(shape) for shape in _longest(parts, optimizer, ranks))
    return moved / (device.hbm_gbs * 1e9) + flops / (device.bf16_tflops * 1e12 * device.gemm_efficiency)


def _by_rule(parts: Sequence[Part], optimizer: str) -> Iterator[tuple[Rule, list[int]]]:
    """The rules of the optimizer with the sizes of their parameters."""
    matrices = Counter(rows * columns for rows, columns in _matrices(parts, optimizer))
    sizes = Counter(size for part in parts if part.gradient == "trained" for size in part.parameters)
    if optimizer == "muon":
        yield RULES["muon"], list(matrices.elements())
        yield RULES["adamw"], list((sizes - matrices).elements())
    elif optimizer == "adamw-8bit":
        yield RULES[optimizer], [size for size in sizes.elements() if in_eight_bits(size)]
        yield RULES["adamw"], [size for size in sizes.elements() if not in_eight_bits(size)]
    else:
        yield RULES[optimizer], list(sizes.elements())


def _matrices(parts: Sequence[Part], optimizer: str) -> list[tuple[int, int]]:
    """Shapes of the matrices that are exchanged; none but with Muon."""
    return [shape for part in parts for shape in part.matrices] if optimizer == "muon" else []


def _longest(parts: Sequence[Part], optimizer: str, ranks: int) -> list[tuple[int, int]]:
    """Of each round the matrix that takes longest."""
    shapes = _matrices(parts, optimizer)
    return [shapes[turn[0]] for turn in rounds(shapes, ranks)]
