"""The configuration of a FLUX whose ControlNet is compared in memory, without files, and a source of its weights."""

from __future__ import annotations

import torch

CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


class InMemory:
    """A module's parameters as a source of weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors = module.state_dict()

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None

    def flat(self, name: str, lo: int, hi: int) -> torch.Tensor:
        return self.tensors[name].flatten()[lo:hi]
