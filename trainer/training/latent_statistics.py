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

from ..distributed.process_group import Ranks
from ..models.flow_head import FlowHead
from ..models.pixel_targets import EncodedTargets, LinearTargets
from ..stages.patch_latent_collate import PatchLatentCollate
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from .inputs import Inputs
from .validation import Spread, reader

IMAGES = 256
"""Images measured, if the data has as many."""
LEAST_STD = 1e-3
"""Least deviation of a channel, relative to the largest one."""


@torch.no_grad()
def measure_statistics(model: object, inputs: Inputs, ranks: Ranks) -> None:
    """Fit targets other than native latents, and set the statistics of a flow head; does nothing to other models. Every
    rank calls it, with the engine built."""
    if not isinstance(model, PatchLatentModel):
        return
    if model.targets is not None:
        _fit(model.targets, inputs, ranks)
    if isinstance(model.head, FlowHead):
        _measure(model, model.head, inputs, ranks)


def _fit(targets: LinearTargets, inputs: Inputs, ranks: Ranks) -> None:
    """Rank 0 fits the targets on the images, and sends them to the others."""
    chosen, encoded = _chosen(inputs), isinstance(targets, EncodedTargets)
    # The others take part in gathering the weights of an encoder.
    places = range(len(chosen)) if ranks.first or encoded else ()
    images = [arrays["images"] for arrays in ranks.agreed(lambda: _read(inputs, chosen, places))]

    def fitted() -> tuple[Tensor, Tensor] | None:
        values = (targets.values(image.to(ranks.device) if encoded else image, torch.float64).cpu() for image in images)
        if ranks.first:
            assert isinstance(inputs.stage, PatchLatentStage)
            return targets.fit(values, inputs.stage.seed)
        deque(values, maxlen=0)
        return None

    mean, basis = ranks.broadcast(ranks.agreed(fitted))
    targets.mean.copy_(mean)
    targets.basis.copy_(basis)


def _measure(model: PatchLatentModel, head: FlowHead, inputs: Inputs, ranks: Ranks) -> None:
    chosen = _chosen(inputs)
    count = len(chosen)
    # A rank without an image of its own takes part in gathering the weights.
    places = [min(start + ranks.rank, count - 1) for start in range(0, count, ranks.size)]
    rows = []
    for arrays in ranks.agreed(lambda: _read(inputs, chosen, places)):
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


def _chosen(inputs: Inputs) -> list[int]:
    """Numbers of the images in the dataset."""
    return Spread(inputs.dataset, inputs.buckets).numbers(IMAGES)


def _read(inputs: Inputs, chosen: Sequence[int], places: Sequence[int]) -> list[dict[str, Tensor]]:
    """Images or cached latents of the samples at `places` of the `chosen` ones, each by itself."""
    collate = inputs.stage.collate(inputs.dataset)
    assert isinstance(collate, PatchLatentCollate)
    read = reader(inputs.dataset, chosen, inputs.stage.image_sizes, "data.shards", inputs.buckets)
    return [collate.latents([read(place)]) for place in places]
