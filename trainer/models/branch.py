"""The visual generation branch: a trainable copy of the text model's layers that predicts masked patch latents.

Legend: B images, N patches (side x side of a square), D hidden width, which is also the latents' width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from ...kernels import gather_rms_norm, mask_mix
from ...kernels.attention import Backend
from ...recipes.branch import Lora, Positions
from .backbone import Prefix
from .image_grids import Grid
from .layers import BranchLayer, RmsNorm
from .rotary import InterleavedRotaryEmbedding

INIT_STD = 0.02
"""Initial standard deviation of the mask token and position table (MAR). Zeros, as in the public release, hit RMSNorm
at its steepest point and multiply the first gradients by about a thousand."""


class GenerationBranch(nn.Module):
    """Decoder layers, final norm, mask token and position table; `PatchLatentModel.load` fills the weights.

    lora: of layers that share the text model's weights, which `low_rank.share` sets; None: of full ones.
    config: the text model's Qwen2_5_VLTextConfig. side: patches along a side of a square image. fused: use Triton for
    mask mix and final norm. layers: of the branch, as many as the prefix has; None: as many as the text model has.
    """

    def __init__(
        self,
        config: Any,
        side: int,
        positions: Positions,
        activation_checkpointing: bool,
        attention: Backend = "sdpa",
        fused: bool = False,
        layers: int | None = None,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.side = side
        self.rotary = positions != "learned"
        self.embedding = InterleavedRotaryEmbedding if positions == "interleaved" else Qwen2_5_VLRotaryEmbedding
        self.activation_checkpointing = activation_checkpointing
        self.attention: Backend = attention
        self.fused = fused
        self.config = copy.deepcopy(config)
        width = config.hidden_size
        with no_init_weights():
            count = config.num_hidden_layers if layers is None else layers
            self.layers = nn.ModuleList([BranchLayer(config, index, lora) for index in range(count)])
            self.norm = FinalNorm(width, config.rms_norm_eps, fused)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, side * side, width))
        else:
            self.register_parameter("positions", None)
        self.restore_rotary()

    def restore_rotary(self) -> None:
        """See `FrozenBackbone.restore_rotary`. DeepSpeed does not move buffers of a model built under `zero.Init`."""
        self.rotary_embedding = self.embedding(self.config).to(self.mask_token.device)

    def position_ids(self, first: Tensor, grid: Grid | None = None) -> Tensor:
        """Rotary positions (t, h, w) of the patches of a grid, [3, B, N], from `first` [B] on: with a prompt of text
        alone, its length n.

        `learned`: all zero, no rotation. Else Qwen's own, t = n, h = n + row, w = n + column. grid: None: the square.
        """
        rows, columns = grid or (self.side, self.side)
        if not self.rotary:
            return first.new_zeros(3, len(first), rows * columns)
        index = torch.arange(rows * columns, device=first.device)
        offsets = torch.stack((torch.zeros_like(index), index // columns, index % columns))
        return offsets[:, None, :] + first[None, :, None]

    def position_table(self, grid: Grid) -> Tensor | None:
        """What is added to the patches of a grid, [1, N, D]: the table, which is the square's, interpolated as those of
        vision transformers are (bicubic, corners not aligned); None for rotary positions."""
        if self.positions is None or grid == (self.side, self.side):
            return self.positions
        rows, columns = (_interpolation(self.side, cells, self.positions.device) for cells in grid)
        # As two products, whose gradients are deterministic on a GPU, which those of `F.interpolate` are not.
        table = rows @ self.positions[0].float().view(self.side, -1)
        table = columns @ table.view(grid[0], self.side, -1)
        return table.view(1, grid[0] * grid[1], -1).to(self.positions.dtype)

    def forward(
        self, latents: Tensor, mask: Tensor, prefix: Prefix, rows: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Hidden states [B, N, D] after the final norm, for `latents` [B, N, D] masked where `mask` [B, N] is True.

        rows: int64 [R], indices into the B N patches to return; the result is then [R, D]. grid: rows and columns of
        the N patches; None: the square.
        """
        positions = self.position_table(grid or (self.side, self.side))
        hidden = mask_mix(latents, mask, self.mask_token, positions, "triton" if self.fused else "reference")
        rotation = None
        if self.rotary:
            first = prefix.layout.both.ends.diff() - mask.shape[1] if prefix.after is None else prefix.after
            rotation = self.rotary_embedding(hidden, self.position_ids(first, grid))
        recomputed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            settings = hidden, prefix, rotation, self.attention, recomputed
            if recomputed:  # layers draw nothing
                hidden = checkpoint(layer, *settings, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(*settings)
        return self.norm(hidden, rows)


@lru_cache
@torch.no_grad()
def _interpolation(cells: int, wanted: int, device: torch.device) -> Tensor:
    """Weights [wanted, cells] by which `F.interpolate` makes `wanted` values of `cells` along one side."""
    unit = torch.eye(cells, device=device)[None, None]
    return F.interpolate(unit, (wanted, cells), mode="bicubic", align_corners=False)[0, 0]


class FinalNorm(RmsNorm):
    """Qwen's RMSNorm, optionally on selected rows only."""

    def __init__(self, width: int, eps: float, fused: bool) -> None:
        super().__init__(width, eps)
        self.fused = fused

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """hidden [B, N, D] -> [B, N, D], or [R, D] for int64 `rows` [R] of the B N."""
        if rows is None:
            return super().forward(hidden)
        provider = "triton" if self.fused else "reference"
        return gather_rms_norm(hidden.flatten(0, 1), rows, self.weight, self.eps, provider)
