"""CLIP score of images and their prompts, by a CLIP in a local folder.

torchmetrics' metric of that name accepts only three model names of the hub, and no folder.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from ...data.retry import described
from ...data.transforms import resized
from ..errors import RunError
from ..io import read_json
from ..models.backbone_config import PIXEL_MEAN, PIXEL_STD
from ..models.tokenizers import open_tokenizer


class ClipScorer:
    """A CLIP with its tokenizer and pixel statistics."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """RunError unless `folder` has a CLIP of transformers."""
        self.device = device
        config = read_json(folder / "config.json")
        if config is None or config.get("model_type") != "clip":
            raise RunError(f"{folder}: not the folder of a CLIP (config.json with model_type clip); download one")
        try:
            # In fp32: half precision moves scores in the second decimal.
            loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except Exception as error:  # transformers raises many types
            raise RunError(f"{folder}: CLIP cannot be loaded ({described(error)}); download it again") from error
        self.model = loaded.eval().to(device)
        text, vision = self.model.config.text_config, self.model.config.vision_config
        self.tokenizer = open_tokenizer(folder, text.vocab_size)
        self.length, self.size = text.max_position_embeddings, vision.image_size
        pixels = read_json(folder / "preprocessor_config.json") or {}
        mean, std = pixels.get("image_mean", PIXEL_MEAN), pixels.get("image_std", PIXEL_STD)
        self.mean, self.std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (mean, std))

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """max(100 cos, 0) of each image, uint8 [B, 3, S, S], and its prompt: [B] in fp64.

        Hessel et al. 2021 have a factor of 2.5; torchmetrics and the literature on text to image have 100. Images are
        scaled as CLIP's processor scales square ones, bicubic; prompts are cut off at the length that CLIP reads.
        """
        squares = [resized(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), self.size) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(self.device)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        found = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=(pixels / 255 - self.mean) / self.std,
        )
        cosines = torch.cosine_similarity(found.image_embeds.double(), found.text_embeds.double())
        return (100 * cosines).clamp(min=0).cpu()
