"""The weights of an ordinary ControlNet from one with low-rank pairs on FLUX's weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..models.controlnet_config import ControlNetConfig, is_shared
from ..models.eight_bit_source import frozen_source
from ..models.flux import FluxFolder
from ..models.latent_controlnet import LatentControlNet
from ..models.weights import Source
from .merged import frozen_weight

PREFIX = "controlnet."
"""Of the trained parameters' names in a checkpoint."""


class MergedControlNet:
    """`Source` of the ControlNet of a run with `controlnet.weights: lora`, under the checkpoint's names: what it shares
    with FLUX is FLUX's, as training held it, plus its pairs, in fp32.

    trained: the run's weights. shape: of its ControlNet, with `lora`.
    """

    def __init__(self, trained: Source, shape: ControlNetConfig, folder: FluxFolder) -> None:
        assert shape.lora is not None
        self.trained, self.lora = trained, shape.lora
        with torch.device("meta"):
            full = LatentControlNet(replace(shape, lora=None))
            transformer = folder.build("transformer")
        self.shapes = {PREFIX + name: tuple(parameter.shape) for name, parameter in full.named_parameters()}
        files = folder.files("transformer")
        self._names, self._flux = frozen_source(
            transformer, folder.names("transformer", transformer, files), files, folder.held
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.shapes.get(name)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return self.full(name).flatten()[lo:hi]

    def full(self, name: str) -> Tensor:
        """A whole weight or bias."""
        shape, short = self.shapes[name], name.removeprefix(PREFIX)
        if (found := self._trained(name)) is not None:
            return found
        assert is_shared(short)
        stem = short.removesuffix(".weight")
        value = frozen_weight(self._flux, self._names[short], shape, self._names.get(f"{stem}.scale"))
        a, b = (self._trained(f"{PREFIX}{stem}.{factor}") for factor in ("lora_A", "lora_B"))
        if stem == short or a is None or b is None:
            return value
        return value + self.lora.scale * (b.float() @ a.float())

    def _trained(self, name: str) -> Tensor | None:
        shape = self.trained.shape(name)
        return None if shape is None else self.trained.flat(name, 0, math.prod(shape)).view(shape)
