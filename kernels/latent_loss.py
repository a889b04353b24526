"""The projection of hidden states to patch latents and its squared error, as one operation.

Legend: T tokens (all patches of a micro-batch in one row), D width of hidden states and latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patch_latent_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    normalizer: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Weighted mean squared error of the projected hidden states, in fp32.

    loss = sum_t token_weight[t] * mean_d (hidden W^T + b - target)[t, d]^2 / normalizer

    hidden, target [T, D]; weight [D, D]; bias [D] or None; token_weight [T]; normalizer: the number of tokens that the
    mean goes over, which under data parallelism is not T. Returns the loss [] and the unweighted mean square of every
    token [T], detached.
    """
    prediction = F.linear(hidden, weight, bias)
    squares = (prediction.float() - target.float()).square().mean(dim=-1)
    return (squares * token_weight.float()).sum() / normalizer, squares.detach()


class PatchLatentHead(nn.Linear):
    """The linear head. Its forward returns the loss, so that ZeRO-3 gathers the weight for both passes."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictions for `hidden` [..., D], or with a target the loss and token losses of `patch_latent_loss`."""
        if target is None:
            return F.linear(hidden, self.weight, self.bias)
        width = hidden.shape[-1]
        if token_weight is None:
            token_weight = torch.ones(hidden.shape[:-1], device=hidden.device)
        return patch_latent_loss(
            hidden.reshape(-1, width),
            self.weight,
            self.bias,
            target.reshape(-1, width),
            token_weight.reshape(-1),
            normalizer,
        )
