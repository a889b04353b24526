"""Feature extractors with random weights, called as those of the StyleGAN releases, and a small CLIP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import tiny_flux


class TinyInception(nn.Module):
    """6 features and 4 classes of an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = F.adaptive_avg_pool2d(img.float() / 25 - 5, [2, 2]).flatten(1)
        features = self.first(x)
        if return_features:
            return features
        logits = F.linear(features, self.last.weight)
        if not no_output_bias:
            logits = logits + self.last.bias
        return logits.softmax(1)


class TinyLpips(nn.Module):
    """LPIPS of one layer: unit vectors of 5 channels, weighted, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3, stride=2)
        self.register_buffer("weights", torch.rand(5))

    def forward(
        self, img: Tensor, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False
    ) -> Tensor:
        if resize_images:
            img = F.interpolate(img, [8, 8])
        x = self.layer(img / 127.5 - 1).relu()
        if return_lpips:
            unit = x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()
            positions = x.shape[2] * x.shape[3]
            return (unit * self.weights.view(1, -1, 1, 1).sqrt() / float(positions) ** 0.5).flatten(1)
        return x.flatten(1)


def save(folder: Path) -> tuple[Path, Path]:
    """Paths of both as TorchScript files."""
    torch.manual_seed(0)
    paths = folder / "inception.pt", folder / "vgg16.pt"
    for module, path in zip((TinyInception(), TinyLpips()), paths, strict=True):
        torch.jit.script(module.eval()).save(str(path))
    return paths


def save_clip(folder: Path) -> Path:
    """A CLIP for images of 8 x 8 pixels that reads captions of the words of `tiny_flux`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 8, "max_position_embeddings": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=shape | text, vision_config={**shape, "image_size": 8, "patch_size": 4}, projection_dim=6
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_flux.tokenizer(9).save_pretrained(folder)
    return folder
