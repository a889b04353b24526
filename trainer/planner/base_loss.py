"""The cost of the frozen base's own loss on understanding sources, next to that of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...recipes.data import Data
from ..models.backbone_config import grid_side
from . import shapes
from .devices import Device
from .flops import head_weight, linear_flops, vision_encoder_part
from .layout import Workload
from .opened import PatchLatents
from .part import Part
from .timing import compute_s, done_flops


@dataclass(frozen=True)
class PlannedTexts:
    """An understanding source. batches_per_step: as in the recipe; tokens: of a sample, placeholders of an image
    included; flops: per training step, of all GPUs; flops_share, time_share: added to a step's FLOPs and to its
    computing time, as a fraction of these; None without a device that has times."""

    name: str
    batches_per_step: float
    tokens: float
    flops: float
    flops_share: float
    time_share: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        time = "" if self.time_share is None else f", {self.time_share:.2%} to its computing time"
        return (
            f"base loss of {self.name}: {self.batches_per_step:g} batches per step, {self.flops / 1e12:.3g} TFLOP per"
            f" step, which adds {self.flops_share:.2%} to the step's FLOPs{time}."
        )


def planned_texts(
    model: PatchLatents, data: Data, parts: Sequence[Part], work: Workload, text: float, device: Device | None
) -> list[PlannedTexts]:
    """The understanding sources with texts of `text` tokens; a question and its answer have as many together, and an
    image. parts: of the model. Gathers of the weights are not counted."""
    timed = device if device is not None and device.bf16_tflops is not None else None
    found = []
    for source in data.understanding:
        rate = float(source.batches_per_step or 0)
        image = grid_side(model.config, model.image_size) if source.asks else 0
        base = base_parts(model, text, image)
        flops = done_flops(base, False)
        share, time = rate * flops / done_flops(parts, work.recomputed), None
        if timed:
            time = rate * compute_s(base, False, timed) / compute_s(parts, work.recomputed, timed)
        total = rate * work.global_batch * flops
        found.append(PlannedTexts(source.name, rate, text + image**2, total, share, time))
    return found


def base_parts(model: PatchLatents, text: float, image: int) -> list[Part]:
    """What one sample takes: a text of `text` tokens, and, if not 0, an image of `image` rows of latents."""
    config, tokens = model.config.text_config, text + image**2
    read = linear_flops(shapes.text_model(config, model.backbone.weights), lambda name: tokens)
    attention = 2.0 * tokens * tokens * config.hidden_size * config.num_hidden_layers
    found = [
        Part("text model", "none", (), read, attention),
        Part("language head", "none", (), 2.0 * text * head_weight(model.config), 0.0),
    ]
    if image:
        found.append(vision_encoder_part(model.config.vision_config, (image, image), "sharded", 2))
    return found
