"""Muon on the matrices of the layers and AdamW on all other parameters, both torch's, under ZeRO-3.

Momentum and decay are computed on each rank's own slices. Newton-Schulz needs whole matrices: they are exchanged so
that every rank orthogonalizes one at a time, in bf16, to which torch's Muon rounds them first; the result is bf16, too.
So the exchange rounds nothing, and the weights are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .rules import adjusted, rounds


class MatrixSlice(NamedTuple):
    """This rank's elements [start, stop) of a flat slice, padding included, which are of a matrix of `shape`."""

    shape: tuple[int, int]
    start: int
    stop: int


class Muon(Optimizer):
    """matrices: the group of matrices; rest: AdamW of the other groups. layout: flat slice of matrices -> its parts,
    set when DeepSpeed has made the flat slices."""

    def __init__(self, matrices: dict[str, Any], rest: AdamW) -> None:
        super().__init__([matrices, *rest.param_groups], {})
        self.matrices, self.rest = matrices, rest
        self.layout: dict[Tensor, list[MatrixSlice]] = {}
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the flat slices that are in the groups; collective over all ranks. Their gradients are overwritten."""
        group = self.matrices
        for flat in group["params"]:
            momentum, average = group["momentum"], self.state[flat]["momentum_buffer"]
            average.lerp_(flat.grad, 1 - momentum)
            _update(flat, flat.grad.lerp_(average, momentum), self.layout[flat], group)
        self.rest.step()


def _update(flat: Tensor, update: Tensor, slices: Sequence[MatrixSlice], group: Mapping[str, Any]) -> None:
    """Subtract the orthogonalized `update` from the master weights `flat`, as many matrices at a time as ranks."""
    ranks = dist.get_world_size()
    for turn in rounds([one.shape for one in slices], ranks):
        chosen = [slices[index] for index in turn]
        sizes = [one.stop - one.start for one in chosen]
        own = torch.cat([update[one.start : one.stop].bfloat16() for one in chosen])
        parts = _orthogonalized(own, sizes, [one.shape for one in chosen], ranks).split(sizes)
        for one, part in zip(chosen, parts, strict=True):
            weights = flat[one.start : one.stop]
            weights.mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(part, alpha=-adjusted(group["lr"], one.shape))


def _orthogonalized(own: Tensor, sizes: list[int], shapes: Sequence[tuple[int, int]], ranks: int) -> Tensor:
    """This rank's slices of one matrix per rank, of `sizes` elements one after the other, from those before: the first
    rank orthogonalizes the first matrix, and so on."""
    if ranks == 1:
        return orthogonal(own.view(shapes[0])).flatten()
    sent = sizes + [0] * (ranks - len(sizes))
    rank = dist.get_rank()
    whole = own.new_empty(ranks * sent[rank])
    dist.all_to_all_single(whole, own, [sent[rank]] * ranks, sent)
    if rank < len(shapes):
        rows, columns = shapes[rank]
        matrix = whole[: rows * columns]
        matrix.copy_(orthogonal(matrix.view(rows, columns)).flatten())
    dist.all_to_all_single(own, whole, sent, [sent[rank]] * ranks)
    return own


def orthogonal(matrix: Tensor) -> Tensor:
    """torch's Newton-Schulz iteration on a bf16 matrix [rows, columns], of the same shape.

    Muon's public class computes it: without momentum and decay, at a rate of 1, it subtracts exactly the result from a
    weight of zeros if the matrix is not taller than wide, for which it would scale the rate.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    weight = nn.Parameter(torch.zeros_like(wide))
    weight.grad = wide
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    result = weight.detach().neg_()
    return result if wide is matrix else result.T
