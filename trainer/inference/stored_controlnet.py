"""The ControlNet of a stage-2 run, or of an export of one, for inference.

Legend: B images, D latent width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...data.bucket_rule import BucketRule
from ..checkpoint.merged_controlnet import PREFIX, MergedControlNet
from ..checkpoint.state import restore_statistics
from ..errors import RunError
from ..models.controlnet_config import ControlNetConfig
from ..models.flux import FluxFolder
from ..models.hub import locate
from ..models.latent_controlnet import LatentControlNet, read_config
from ..models.text_bridge import Bridge, build_bridge
from ..models.text_bridge_config import BridgeConfig
from ..models.weights import Source, WeightFiles, fill
from ..stages import open_controlnet
from ..stages.unsharded import init_context
from .stored_runs import checkpoint_weights, has_checkpoints, has_recipe, stored_recipe


@dataclass(frozen=True)
class StoredControlNet:
    network: Bridge
    folder: FluxFolder
    """Of the FLUX that it was trained on."""
    size: int
    """Side of its images in pixels."""
    rule: BucketRule | None = None
    """Of the aspect-ratio buckets that it was trained in; None: squares."""


def load_controlnet(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> StoredControlNet:
    """The ControlNet, or other bridge, of a stage-2 run, a checkpoint of one or an export, with low-rank pairs merged.

    flux: path of the FLUX; a run and an export of pairs name their own, a `flux_controlnet` folder does not. RunError
    unless the ControlNet fits patch latents [B, side^2, width].
    """
    where = width, side, device, dtype
    return _of_recipe(path, flux, *where) if has_recipe(path) else _of_folder(path, flux, *where)


def _of_recipe(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> StoredControlNet:
    recipe = stored_recipe(path, "controlnet")
    assert recipe.flux is not None
    if flux:
        recipe = recipe.model_copy(update={"flux": recipe.flux.model_copy(update={"path": flux, "revision": None})})
    stage = open_controlnet(recipe)
    shape, folder, size = stage.shape, stage.folder, stage.flux.image_size
    checkpoint = checkpoint_weights(path) if has_checkpoints(path) else None
    source: Source = checkpoint or WeightFiles(path)
    trained = source
    if isinstance(shape, ControlNetConfig) and shape.lora:
        source, shape = MergedControlNet(trained, shape, folder), replace(shape, lora=None)
    shape.require(folder.transformer, width, side, folder.grid(size))
    network = _unfilled(shape, device, dtype)
    fill({PREFIX + name: parameter for name, parameter in network.named_parameters()}, source, path)
    statistics: dict[str, Any] = {PREFIX + name: buffer for name, buffer in network.statistics().items()}
    if checkpoint:
        restore_statistics(statistics, checkpoint.reader, checkpoint.slot)
    else:
        for name, buffer in statistics.items():
            buffer.copy_(trained.flat(name, 0, buffer.numel()).view_as(buffer))
    return StoredControlNet(network, folder, size, stage.bucket_rule)


def _of_folder(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> StoredControlNet:
    shape, source = read_config(path)
    if flux is None:
        raise RunError(f"{path}: names no FLUX; give the one it was trained on, such as --flux FOLDER")
    folder = FluxFolder.open(locate(flux, None, "--flux", "*/*.safetensors"))
    size = 2 * folder.stride * {"up": 2 * side, "none": side, "down": side // 2}[shape.resampling]
    shape.require(folder.transformer, width, side, folder.grid(size))
    network = _unfilled(shape, device, dtype)
    assert isinstance(network, LatentControlNet)
    network.load(source, path)
    return StoredControlNet(network, folder, size)


def _unfilled(shape: BridgeConfig, device: torch.device, dtype: torch.dtype) -> Bridge:
    """A frozen bridge without weights."""
    with init_context(device, dtype):
        return build_bridge(shape).eval().requires_grad_(False)
