"""Settings of generation: decoding of the patch latents, and sampling of FLUX."""

from __future__ import annotations

from dataclasses import dataclass, field

from .flux_sampler import Sampling
from .masked_decoding import Schedule


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
