"""Feature extractors in TorchScript files, called as those of the StyleGAN releases are.

`inception-2015-12-05.pt` takes uint8 images [B, 3, H, W], scales them itself, and returns features with
`return_features=True`, else class probabilities, with `no_output_bias=True` without the last layer's bias. `vgg16.pt`
takes the same images as floats and with `return_lpips=True` returns vectors whose squared distance is LPIPS.

Legend: B images of S x S pixels, F features, C classes, K values of an LPIPS vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError


class Extractor:
    """A TorchScript module on a device."""

    def __init__(self, path: Path, arguments: Collection[str], device: torch.device) -> None:
        """arguments: those that its forward must have. RunError unless `path` is such a file."""
        self.path, self.device = path, device
        if not path.is_file():
            raise RunError(f"{path}: no such file; name a TorchScript file, see docs/evaluation.md")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but the format of the published weights
            try:
                self.module: Any = torch.jit.load(str(path), map_location=device).eval()
            except RuntimeError as error:
                raise RunError(f"{path}: is not a TorchScript file; weights alone cannot be run") from error
        known = {argument.name for argument in self.module.forward.schema.arguments}
        if missing := sorted(set(arguments) - known):
            raise RunError(f"{path}: its forward has no argument {missing[0]}; see docs/evaluation.md for the files")

    @torch.no_grad()
    def __call__(self, images: Tensor, **how: bool) -> Tensor:
        """A vector per image, on the CPU. RunError if it fails on such images, or its values are not finite."""
        try:
            found = self.module(images.to(self.device), **how)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            side, last = images.shape[-1], str(error).strip().splitlines()[-1]
            raise RunError(f"{self.path}: fails on images of {side} x {side} pixels: {last}") from error
        found = found.flatten(1).cpu()
        if not bool(found.isfinite().all()):
            raise RunError(f"{self.path}: its values are not finite; fetch the file again")
        return found


class Inception(Extractor):
    """The network of FID, KID and the Inception score."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path, ("return_features", "no_output_bias"), device)

    def features(self, images: Tensor) -> Tensor:
        """[B, F] of uint8 [B, 3, S, S]."""
        return self(images, return_features=True)

    def probabilities(self, images: Tensor) -> Tensor:
        """[B, C] of uint8 [B, 3, S, S]."""
        return self(images, no_output_bias=True)


class Lpips(Extractor):
    """Perceptual distance of Zhang et al. 2018."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path, ("return_lpips", "resize_images"), device)

    def distances(self, one: Tensor, other: Tensor) -> Tensor:
        """[B] of uint8 [B, 3, S, S] each, without scaling them."""
        a, b = (self(images.float(), resize_images=False, return_lpips=True) for images in (one, other))
        return (a - b).double().square().sum(1)
