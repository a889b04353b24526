"""What a model takes from the data once, before the first step: other targets than native latents, and the mean and
deviation by which a flow head normalises latents.

They are of images spread evenly over the data. Latents are encoded image by image and summed in the same order, so that
the statistics are equal on any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ...data import Dataset
from ..distributed.process_group import Ranks
from ..models.flow_head import FlowHead
from ..models.pixel_targets import EncodedTargets, LinearTargets
from ..stages import Stage
from ..stages.patch_latent_collate import PatchLatentCollate
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from .validation import spread_samples

IMAGES = 256
"""Images measured, if the data has as many."""
LEAST_STD = 1e-3
"""Least deviation of a channel, relative to the largest one."""


@torch.no_grad()
def measure_statistics(model: object, stage: Stage, dataset: Dataset, ranks: Ranks) -> None:
    """Fit targets other than native latents, and set the statistics of a flow head; does nothing to other models. Every
    rank calls it, with the engine built."""
    if not isinstance(model, PatchLatentModel):
        return
    assert isinstance(stage, PatchLatentStage)
    if model.targets is not None:
        _fit(model.targets, stage, dataset, ranks)
    if isinstance(model.head, FlowHead):
        _measure(model, model.head, stage, dataset, ranks)


def _fit(targets: LinearTargets, stage: PatchLatentStage, dataset: Dataset, ranks: Ranks) -> None:
    """Rank 0 fits the targets on the images, and sends them to the others."""
    count, encoded = min(IMAGES, len(dataset)), isinstance(targets, EncodedTargets)
    # The others take part in gathering the weights of an encoder.
    numbers = range(count) if ranks.first or encoded else ()
    images = [arrays["images"] for arrays in ranks.agreed(lambda: _read(stage, dataset, count, numbers))]

    def fitted() -> tuple[Tensor, Tensor] | None:
        values = (targets.values(image.to(ranks.device) if encoded else image, torch.float64).cpu() for image in images)
        if ranks.first:
            return targets.fit(values, stage.seed)
        deque(values, maxlen=0)
        return None

    mean, basis = ranks.broadcast(ranks.agreed(fitted))
    targets.mean.copy_(mean)
    targets.basis.copy_(basis)


def _measure(model: PatchLatentModel, head: FlowHead, stage: PatchLatentStage, dataset: Dataset, ranks: Ranks) -> None:
    count = min(IMAGES, len(dataset))
    # A rank without an image of its own takes part in gathering the weights.
    numbers = [min(start + ranks.rank, count - 1) for start in range(0, count, ranks.size)]
    rows = []
    for arrays in ranks.agreed(lambda: _read(stage, dataset, count, numbers)):
        latents = arrays.get("latents")
        if latents is None:
            latents = model.patch_latents(arrays["images"].to(ranks.device))
        values = latents.flatten(0, 1).double().cpu()
        rows.append(torch.stack((values.mean(0), values.square().mean(0))))
    shares = ranks.gather(rows)
    mean, square = torch.stack([shares[n % ranks.size][n // ranks.size] for n in range(count)]).mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    head.mean.copy_(mean)
    head.std.copy_(std.clamp(min=LEAST_STD * float(std.max())))


def _read(stage: Stage, dataset: Dataset, count: int, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
    """Images or cached latents of samples `numbers` of `count` spread over the data, each by itself."""
    collate = stage.collate(dataset)
    assert isinstance(collate, PatchLatentCollate)
    read = spread_samples(dataset, count, stage.image_sizes, "data.shards")
    return [collate.latents([read(number)]) for number in numbers]
