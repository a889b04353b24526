"""Outputs of the MLLM's vision encoder, the patch latents, for a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data import RawSample
from ...kernels.attention import unavailable
from ..distributed.process_group import Gather, single_process
from ..models.backbone import FrozenBackbone
from ..models.backbone_config import grid_side
from ..models.weights import WeightFiles
from .encoder_images import EncoderImages
from .latent_cache import VERSION, Kind
from .unsharded import init_context

SETTINGS = (
    "hidden_act",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "fullatt_block_indexes",
)
"""What determines the latents in addition to weights and their shapes."""


class VisionOutputs:
    """`FrozenOutputs` of the vision encoder: `latents` [N, D] of every image."""

    kind: Kind = "vision"
    empty = False

    def __init__(self, setting: str, config: Any, files: WeightFiles, images: EncoderImages, precision: str) -> None:
        """config: the backbone's Qwen2_5_VLConfig."""
        self.setting = setting
        self.config = config
        self.files = files
        self.images = images
        self.missing = images.missing
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.precision = precision
        self._loaded: FrozenBackbone | None = None

    def fingerprint(self, rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> dict[str, Any]:
        files = self.files
        with torch.device("meta"):
            names = list(FrozenBackbone(self.config, text=False).names(files).values())
        files.require(names)
        return {
            "version": VERSION,
            "kind": self.kind,
            "precision": self.precision,
            "vision encoder weights": files.content_hash(names, rank, ranks, gather),
            "vision config": {name: getattr(self.config.vision_config, name) for name in SETTINGS},
            "data.image_size": self.images.size,
            **self.images.fingerprint,
        }

    @property
    def sample_bytes(self) -> int:
        unit = self.images.size // grid_side(self.config, self.images.size)
        patches = max(height * width for height, width in self.images.shapes) // unit**2
        return patches * self.config.vision_config.out_hidden_size * self.dtype.itemsize

    def read(self, sample: RawSample) -> Tensor:
        return self.images.read(sample.image)

    def truncated(self, inputs: list[Tensor]) -> int:
        return 0

    def encode(self, inputs: list[Tensor], device: torch.device) -> list[dict[str, Tensor]]:
        if self._loaded is None:
            self._loaded = load_vision_encoder(self.config, self.files, device, self.dtype)
        backbone = self._loaded
        return [{"latents": latents} for latents in backbone.patch_latents(torch.stack(inputs).to(device))]


def load_vision_encoder(config: Any, files: WeightFiles, device: torch.device, dtype: torch.dtype) -> FrozenBackbone:
    """The vision encoder alone of an MLLM of `config`, on `device`."""
    attention = "varlen" if unavailable("varlen", device, dtype) is None else "sdpa"
    with init_context(device, dtype):
        backbone = FrozenBackbone(config, vision_attention=attention, text=False).eval()
    backbone.restore_rotary()
    backbone.load(files)
    return backbone.to(device)
