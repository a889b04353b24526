"""Stages whose weights no file holds: drawn on the device that uses them, so that nothing is downloaded or read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..distributed.gather import Gather, single_process
from ..models.backbone import FrozenBackbone
from ..models.flux import FluxFolder
from ..models.flux_config import Part
from ..models.weights import WeightFiles
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage
from ..stages.target_encoders import TargetVae

DEVIATION = 0.02
"""Standard deviation of the weights; those of norms are around 1."""


class RandomWeights(WeightFiles):
    """Weights under the names of a model's files. A function of name and range: replicas on several ranks are equal.

    Drawing seeds torch's generators.
    """

    def __init__(self, path: Path, module: nn.Module, names: Callable[[WeightFiles], dict[str, str]]) -> None:
        """path: for messages. module: has the shapes. names: its parameters -> names in the files given to it."""
        self.path = path
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shapes: dict[str, tuple[int, ...]] = {}  # while empty, `names` assumes the usual ones
        own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._shapes = {theirs: own[name] for name, theirs in names(self).items()}

    @property
    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        digest = hashlib.sha256(f"{name} {lo}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "little"))
        values = torch.empty(hi - lo, device=self._device).normal_(std=DEVIATION)
        norm = len(self._shapes[name]) == 1 and name.endswith("weight")
        return values.add_(1) if norm else values

    def stored_rows(self, name: str, first: int, last: int) -> None:
        """None: no weight is stored in 8 bits."""

    def require(self, names: Iterable[str]) -> None:
        assert not set(names) - self._shapes.keys()

    def refuse_unread(self, names: Iterable[str]) -> None:
        """Nothing else is stored."""

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> str:
        return "random"


class RandomFlux(FluxFolder):
    """A FLUX of which only the configs are read."""

    def files(self, part: Part) -> WeightFiles:
        with torch.device("meta"):
            module = replace(self, held="bf16").build(part)
        return RandomWeights(self.path / part, module, partial(self.names, part, module))


class RandomControlNet(ControlNetStage):
    """Stage 2 with random frozen weights. The ControlNet is initialised from them as from a model's."""

    def backbone_files(self) -> WeightFiles:
        return _backbone(self.config, self.backbone.path, text=False)


def randomised(stage: PatchLatentStage | ControlNetStage) -> PatchLatentStage | ControlNetStage:
    """A copy of a stage opened for counting, to be built and loaded as in a run, with random frozen weights."""
    if isinstance(stage, PatchLatentStage):
        files = _backbone(stage.config, stage.backbone.path, text=True)
        encoder = stage.encoder
        if isinstance(encoder, TargetVae):
            encoder = replace(encoder, folder=_flux(encoder.folder))
        elif encoder:
            encoder = replace(encoder, files=_backbone(encoder.config, encoder.path, text=False))
        return replace(stage, files=files, encoder=encoder, for_counting=False)
    own = {each.name: getattr(stage, each.name) for each in fields(stage)}
    return RandomControlNet(**{**own, "folder": _flux(stage.folder), "for_counting": False})


def _flux(folder: FluxFolder) -> RandomFlux:
    return RandomFlux(**{each.name: getattr(folder, each.name) for each in fields(folder)})


def _backbone(config: object, path: str, text: bool) -> RandomWeights:
    with torch.device("meta"):
        module = FrozenBackbone(config, text=text)
    return RandomWeights(Path(path), module, module.names)
