"""The frozen encoders of targets other than the MLLM's own latents, opened and checked; nothing is built yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...recipes.schema import Branch, Flux
from ..models import weights
from ..models.backbone import FrozenBackbone, read_config
from ..models.backbone_config import require_same_grid
from ..models.hub import architecture, locate
from ..models.kernel_selection import KernelChoice

if TYPE_CHECKING:  # imported where they are needed: diffusers takes a second, and no other run of stage 1 needs it
    from ..models.encoded_targets import EncoderTargets, VaeTargets
    from ..models.flux import FluxFolder


@dataclass(frozen=True)
class TargetVae:
    """The VAE of a FLUX, of which no other weights are needed."""

    flux: Flux
    folder: FluxFolder

    @classmethod
    def open(cls, flux: Flux, side: int, for_counting: bool) -> TargetVae:
        """For `side` x `side` patches. RunError names what cannot be used."""
        from ..models.flux import FluxFolder

        if for_counting:
            path = architecture(flux.path, flux.revision, "flux.path")
        else:
            path = locate(flux.path, flux.revision, "flux.path", "vae/*.safetensors")
        folder = FluxFolder.open(path, for_counting=True)
        folder.values_of_patch(flux.image_size, side)  # refuses sizes that do not fit
        if not for_counting:
            weights.weight_files(path / "vae")
        return cls(flux, folder)

    @property
    def source(self) -> str:
        return f"flux.path={self.flux.path}"

    @property
    def identity(self) -> tuple[str, ...]:
        """Settings, in addition to those of `branch`, that decide about the targets."""
        return ("flux.image_size",)

    def targets(self, patches: int, width: int, kernels: KernelChoice) -> VaeTargets:
        """The targets [B, patches, width], without weights."""
        from ..models.encoded_targets import VaeTargets

        return VaeTargets(self.folder, self.flux.image_size, patches, width)

    def frozen(self) -> tuple[weights.WeightFiles, list[str]]:
        """The files of the weights, and the names of the weights used."""
        files = self.folder.files("vae")
        with torch.device("meta"):
            return files, list(self.folder.names("vae", self.folder.build("vae"), files).values())


@dataclass(frozen=True)
class TargetEncoder:
    """The vision encoder of a Qwen2.5-VL. config: its Qwen2_5_VLConfig; files: None for counting."""

    path: str
    config: Any
    files: weights.WeightFiles | None

    @classmethod
    def open(cls, path: str, image_size: int, side: int, for_counting: bool) -> TargetEncoder:
        """As `TargetVae.open`. image_size: in pixels."""
        folder = (architecture if for_counting else locate)(path, setting="branch.encoder")
        config = read_config(folder)
        require_same_grid(config, image_size, side)
        return cls(path, config, None if for_counting else weights.WeightFiles(folder))

    @property
    def source(self) -> str:
        return f"branch.encoder={self.path}"

    @property
    def identity(self) -> tuple[str, ...]:
        return ()

    def targets(self, patches: int, width: int, kernels: KernelChoice) -> EncoderTargets:
        from ..models.encoded_targets import EncoderTargets

        return EncoderTargets(self.config, self.files, patches, width, kernels.vision)

    def frozen(self) -> tuple[weights.WeightFiles, list[str]]:
        assert self.files is not None
        with torch.device("meta"):
            return self.files, list(FrozenBackbone(self.config, text=False).names(self.files).values())


def open_target_encoder(
    branch: Branch, flux: Flux | None, image_size: int, side: int, for_counting: bool
) -> TargetVae | TargetEncoder | None:
    """What encodes the targets of `side` x `side` patches of images of `image_size` pixels; None for native latents and
    for functions of pixels. RunError names what cannot be used."""
    if branch.targets == "vae":
        assert flux is not None, "required by the recipe schema"
        return TargetVae.open(flux, side, for_counting)
    if branch.targets == "encoder":
        assert branch.encoder is not None, "required by the recipe schema"
        return TargetEncoder.open(branch.encoder, image_size, side, for_counting)
    return None
