"""The trained parts of a pipeline as diffusers loads them: each reads its sub-folder, verified by the list of hashes.

diffusers accepts a class only from a module that also has the base class by which it loads it, here `ModelMixin`.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ..checkpoint.sums import verify_sums
from ..errors import RunError
from ..models.image_grids import Grid
from ..models.latent_controlnet import LatentControlNet, read_config
from ..stages import open_patch_latents
from ..stages.unsharded import init_context
from .latent_decoder import LatentDecoder, read_decoder, require_native
from .mllm import decode_prompts
from .settings import Settings
from .stored_runs import stored_recipe


class PatchLatentDecoder(ModelMixin):
    """Stage 1: prompts to patch latents, by the frozen text model and the branch; with the vision encoder if it was
    trained on editing pairs, whose source images it reads."""

    def __init__(self, decoder: LatentDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.model = decoder.mllm

    @property
    def width(self) -> int:
        """D, the width of the patch latents."""
        return self.model.branch.config.hidden_size

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.model.branch.side

    def forward(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        grid: Grid | None = None,
        sources: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Patch latents [B, N, D] of the prompts, as one batch; see `decode_prompts`."""
        return decode_prompts(self.model, self.decoder.template, prompts, seeds, settings, grid, sources)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device_map: Any = None,
        backbone: str | None = None,
        **_: Any,
    ) -> PatchLatentDecoder:
        """Load the sub-folder of a pipeline, and the frozen model that it names.

        backbone: folder or hub id of that model, if it is elsewhere. device_map: a device; default the CPU, in fp32.
        Diffusers passes more options, of which none applies. RunError names what cannot be used.
        """
        path, device = Path(path), device_of(device_map)
        verify_sums(path.parent, path.name)
        recipe = stored_recipe(path, "patch-latents")
        # Registered with the model, so that it moves with it; all placements compute the same.
        changes: dict[str, Any] = {"placement": "sharded"}
        if backbone is not None:
            changes |= {"path": backbone, "revision": None}
        recipe = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=changes)})
        try:
            stage = open_patch_latents(recipe)
        except RunError as error:
            raise RunError(f"{error}; or pass backbone=FOLDER_OR_HUB_ID") from error
        require_native(stage, path)
        decoder = read_decoder(path, stage, device, torch_dtype or torch.float32, vision=stage.edits)
        return cls(decoder).requires_grad_(False).eval()


class ControlNet(LatentControlNet):
    """Stage 2: the latent ControlNet, which is read from a `flux_controlnet` folder."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, torch_dtype: torch.dtype | None = None, device_map: Any = None, **_: Any
    ) -> ControlNet:
        """Load the sub-folder of a pipeline; options as of `PatchLatentDecoder`."""
        path = Path(path)
        verify_sums(path.parent, path.name)
        shape, files = read_config(path)
        with init_context(device_of(device_map), torch_dtype or torch.float32):
            network = cls(shape).eval().requires_grad_(False)
        network.load(files, path)
        return network


def device_of(device_map: Any) -> torch.device:
    """The one device of a `device_map`; RunError for a map of several."""
    if isinstance(device_map, Mapping):
        device_map = device_map.get("")
        if device_map is None:
            raise RunError("device_map: give one device, such as device_map='cuda'")
    return torch.device(device_map or "cpu")
