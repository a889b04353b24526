"""Resampling of the patch latents' grid to FLUX's token grid: twice as fine, equal, or half as fine.

The upsampling block is the public release's, with its names `upconv`, `bn1`, `conv`, `bn2`; downsampling mirrors it.

Legend: B samples of this rank, D latent width, g side of a grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .buffers import Fp32Buffers
from .controlnet_config import Norm

_OVER = (0, 2, 3)
"""Axes of [B, D, g, g] over which channel statistics are computed."""


class SyncedBatchNorm(Fp32Buffers):
    """BatchNorm2d over the samples of all ranks; torch's SyncBatchNorm needs CUDA.

    Statistics and arithmetic are fp32 for any input dtype; running statistics stay fp32 when the module is cast. All
    ranks must have the same number of samples.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        # `zero.Init` creates every tensor in the compute dtype, whatever dtype is requested.
        self.register_buffer("running_mean", torch.zeros(width).float())
        self.register_buffer("running_var", torch.ones(width).float())
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D, g, g], normalised per channel."""
        if not self.training:
            scale = (self.running_var + self.eps).rsqrt() * self.weight.float()
            return ((x.float() - _wide(self.running_mean)) * _wide(scale) + _wide(self.bias.float())).to(x.dtype)
        out, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[misc]
        with torch.no_grad():
            count = x.numel() // x.shape[1] * _ranks()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return out


class _Normalise(torch.autograd.Function):
    """Batch normalisation with sums over all ranks in the forward and backward pass (Ioffe, Szegedy 2015).

    Gradients of weight and bias are local: the engine averages them over ranks after the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        values = x.float()
        var, mean = torch.var_mean(values, dim=_OVER, correction=0)
        common = _mean_over_ranks(mean)
        # Around the common mean: a difference of large squares would cancel.
        var = _mean_over_ranks(var + (mean - common).square())
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, common, inverse)
        ctx.mark_non_differentiable(common, var)
        out = (values - _wide(common)) * _wide(inverse * weight.float()) + _wide(bias.float())
        return out.to(x.dtype), common, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, mean, inverse = ctx.saved_tensors
        grad, dtype = grad.float(), grad.dtype
        normal = (x.float() - _wide(mean)) * _wide(inverse)
        own = torch.stack((grad.mean(dim=_OVER), (grad * normal).mean(dim=_OVER)))
        bias_mean, weight_mean = _mean_over_ranks(own)
        scale = _wide(inverse * weight.float())
        d_x = scale * (grad - _wide(bias_mean) - normal * _wide(weight_mean))
        d_bias, d_weight = own * (x.numel() // x.shape[1])
        return d_x.to(dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None


def _wide(channels: Tensor) -> Tensor:
    """[D] -> [D, 1, 1]"""
    return channels[:, None, None]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_over_ranks(values: Tensor) -> Tensor:
    if (ranks := _ranks()) == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / ranks


def _norm(kind: Norm, width: int) -> nn.Module:
    if kind == "batch":
        return SyncedBatchNorm(width)
    return nn.GroupNorm(max(groups for groups in range(1, 33) if width % groups == 0), width)


class UpsamplingBlock(nn.Module):
    """relu(bn2(conv(relu(bn1(upconv(x))))) + x repeated 2 x 2)."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.bn1 = _norm(norm, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = _norm(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, g, g] -> [B, D, 2g, 2g]"""
        added = self.bn2(self.conv(F.relu(self.bn1(self.upconv(x)))))
        return F.relu(added + F.interpolate(x, scale_factor=2, mode="nearest"))


class DownsamplingBlock(nn.Module):
    """relu(bn2(conv(relu(bn1(downconv(x))))) + 2 x 2 average of x)."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.downconv = nn.Conv2d(width, width, 2, stride=2)
        self.bn1 = _norm(norm, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = _norm(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, 2g, 2g] -> [B, D, g, g]"""
        added = self.bn2(self.conv(F.relu(self.bn1(self.downconv(x)))))
        return F.relu(added + F.avg_pool2d(x, 2))


def on_grid(block: nn.Module, latents: Tensor, columns: int | None = None) -> Tensor:
    """Apply `block` to latents [B, N, D] in raster order; returns [B, N', D]. columns: of their grid, None for a
    square."""
    columns = math.isqrt(latents.shape[1]) if columns is None else columns
    return block(latents.unflatten(1, (-1, columns)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
