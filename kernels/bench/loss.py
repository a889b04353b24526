"""Benchmark of head and loss: every provider against the public release's code and a floor of three GEMMs.

Legend as in `latent_loss`, with K = D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import latent_loss
from ..latent_loss import patch_latent_loss
from ..latent_loss_triton import tiles
from .cases import Candidate, Floor, Mode, Problem, Shape, Wanted, Work, compiled, not_compiled, random_tensors


def eager_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """As in the public release: both sides cast to fp32, mean over all elements."""
    return F.mse_loss(F.linear(hidden, weight, bias).float(), target.float(), reduction="mean")


def latent_loss_work(tokens: int, width: int, itemsize: int) -> dict[Mode, Work]:
    """Three GEMMs of 2 T D^2 FLOPs; each reads or writes two [T, D] and one [D, D].

    The target is read in addition. Forward stores the residual, no-grad does not.
    """
    rows, square, gemm = tokens * width * itemsize, width * width * itemsize, 2 * tokens * width * width
    forward, backward = Work(gemm, 3 * rows + square), Work(2 * gemm, 4 * rows + 2 * square)
    return {
        "forward": forward,
        "backward": backward,
        "full": forward + backward,
        "no-grad": Work(gemm, 2 * rows + square),
    }


def latent_loss_problem(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, wanted: Wanted) -> Problem:
    """All token weights are one, as in the public release; the residual is half as large as the prediction."""
    width, normal = shape.width, random_tensors(device, dtype)
    hidden, weight, bias = normal(tokens, width), normal(width, width) * width**-0.5, normal(width)
    target = F.linear(hidden, weight, bias) + 0.5 * normal(tokens, width)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    token_weight, one = torch.ones(tokens, device=device), torch.ones((), device=device)
    candidates, skipped = [], {}

    def add(provider: str, baseline: bool, call: Callable[[], Any], config: str = "") -> None:
        candidates.append(Candidate(provider, baseline, call, leaves, one, config=config))

    if wanted("eager"):
        add("eager", True, lambda: eager_loss(*leaves, target))
    if wanted("compile"):
        fast = compiled(eager_loss)
        add("compile", True, lambda: fast(*leaves, target))
    for provider in filter(wanted, latent_loss.PROVIDERS):
        reason = None if provider == "reference" else not_compiled(device)
        reason = reason or latent_loss.unavailable(provider, device, dtype)
        if reason:
            skipped[provider] = reason
            continue
        config = ""
        if provider != "reference":
            tile = tiles(provider, hidden.element_size(), torch.cuda.get_device_capability(device)[0])
            config = " ".join(f"{name}={value}" for name, value in tile._asdict().items())
        add(
            provider,
            False,
            lambda provider=provider: patch_latent_loss(*leaves, target, token_weight, tokens, provider)[0],
            config,
        )

    def exact() -> list[Tensor]:
        """In slices: all of it in fp64 would take several times the memory of the operation."""
        w, b, scale = weight.detach().double(), bias.detach().double(), 1 / (tokens * width)
        loss, d_weight, d_bias = torch.zeros((), device=device).double(), torch.zeros_like(w), torch.zeros_like(b)
        d_hidden = []
        for some, wants in zip(hidden.detach().split(8192), target.split(8192), strict=True):
            h = some.double()
            residual = h @ w.T + b - wants.double()
            loss += residual.square().sum()
            d_hidden.append(residual @ w)
            d_weight += residual.T @ h
            d_bias += residual.sum(0)
        return [loss * scale, *(2 * scale * x for x in (torch.cat(d_hidden), d_weight, d_bias))]

    rows, matrix = hidden.detach(), weight.detach()

    def forward() -> None:
        torch.mm(rows, matrix.T)

    def backward() -> None:
        torch.mm(target, matrix)
        torch.mm(target.T, rows)

    def full() -> None:
        forward()
        backward()

    gemms = {"forward": forward, "backward": backward, "full": full, "no-grad": forward}
    return Problem(
        "latent-loss",
        shape,
        tokens,
        candidates,
        skipped,
        exact,
        latent_loss_work(tokens, width, hidden.element_size()),
        lambda mode: [Floor(gemms[mode])],
    )
