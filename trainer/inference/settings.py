"""Settings of generation: decoding of the patch latents, and sampling of FLUX."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

from ..errors import RunError
from .masked_decoding import Schedule


@dataclass(frozen=True)
class Sampling:
    """Settings of FLUX's sampling. The defaults are those of the public release."""

    steps: int = 28
    guidance: float = 3.5
    """FLUX guidance scale, if the model takes one."""
    conditioning_scale: float = 0.7
    """Factor of the ControlNet's residuals; 1 in training. Other bridges have none."""
    cfg: float = 1.0
    """w of empty + w (text - empty), on FLUX's text only; 1 skips the empty prompt."""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise RunError(f"{self.steps!r} FLUX steps: set a whole number of 1 or more")
        _require_number("FLUX guidance scale", self.guidance)
        _require_number("conditioning scale", self.conditioning_scale)
        _require_number("guidance of FLUX's text", self.cfg)


@dataclass(frozen=True)
class Settings:
    """Generation settings."""

    steps: int = 16
    """Decoding steps, up to the number of patches."""
    schedule: Schedule = "cosine"
    guidance: float = 1.0
    """w of uncond + w (cond - uncond) on the patch latents; 1 skips the unconditional prompts."""
    controlnet: bool = True
    """False is a control experiment: FLUX sees only its text, and no latents are decoded."""
    empty_prompt: bool = False
    """True is a control experiment: FLUX gets the empty prompt, so that only the latents condition it."""
    flux: Sampling = field(default_factory=Sampling)
    temperature: float = 1.0
    """Standard deviation of the noise from which a flow head samples."""
    shape: str | None = None
    """Width x height of the images in pixels, such as `576x448`, of a model in aspect-ratio buckets; None: squares."""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Integral):
            raise RunError(f"{self.steps!r} decoding steps: set a whole number")
        if self.schedule not in get_args(Schedule):
            raise RunError(f"schedule {self.schedule!r}: give {' or '.join(get_args(Schedule))}")
        _require_number("guidance of the latents", self.guidance)
        _require_number("temperature", self.temperature)
        if self.temperature < 0:
            raise RunError(f"temperature {self.temperature:g}: give 0 or more")


def _require_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RunError(f"{name} {value!r}: give a finite number")
