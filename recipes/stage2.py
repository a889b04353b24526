"""Settings of stage 2: the frozen FLUX and the ControlNet."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from .fields import HeldWeights, OptionalPlace, Place
from .low_rank import LowRank
from .section import Section

T5_TOKENS = 512
"""T5 tokens of a prompt that FLUX.1-dev was trained with."""


class Placement(Section):
    """Placement of the frozen modules: sharded over the ranks, replicated on each rank, offloaded to host memory while
    not in use, or cached, with their outputs precomputed by `bifrost data encode`. Affects results only by rounding; a
    run may resume with another placement."""

    transformer: Literal["sharded", "replicated"] = "sharded"
    """FLUX's transformer."""
    vae: Literal["sharded", "replicated", "offloaded", "cached"] = "sharded"
    """FLUX's VAE."""
    text: Literal["sharded", "replicated", "offloaded", "cached"] = "sharded"
    """FLUX's text encoders, T5 and CLIP; cached T5 states take megabytes per sample."""
    vision_encoder: Literal["sharded", "replicated", "offloaded", "cached"] = "sharded"
    """The MLLM's vision encoder; its cache is the one of stage 1."""

    @property
    def cached(self) -> list[Literal["vae", "text", "vision"]]:
        """The cached parts."""
        asked: dict[Literal["vae", "text", "vision"], str]
        asked = {"vae": self.vae, "text": self.text, "vision": self.vision_encoder}
        return [part for part, place in asked.items() if place == "cached"]


class Flux(Section):
    path: Place
    """Folder or hub id of a FLUX.1 model in the layout of diffusers, or `builtin:tiny-flux`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to read; ignored for folders."""
    image_size: int = Field(default=512, gt=0)
    """Side in pixels of the square image that FLUX generates; a multiple of 16, or of what its VAE requires."""
    guidance: float = Field(default=3.5, ge=0)
    """Guidance scale passed to FLUX and the ControlNet during training; ignored by schnell."""
    draws: int = Field(default=1, ge=1)
    """Noise levels per sample and step, over which the loss is averaged. They share vision encoder, VAE and text
    encoders; FLUX and ControlNet have `micro_batch` x `draws` images per backward pass. See docs/stage2.md."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a caption is replaced by an empty one."""
    caption_exchange: float = Field(default=0.0, ge=0, le=1)
    """Probability that a kept caption is replaced by that of the shard's next readable sample; see docs/stage2.md."""
    text_tokens: int = Field(default=T5_TOKENS, gt=0)
    """T5 tokens per caption: shorter captions are padded, longer ones cut. At most as many as FLUX was trained with,
    512 (dev) or 256 (schnell). Fewer save time and memory, see docs/stage2.md. Part of the results: a run resumes with
    the same value."""
    weights: HeldWeights = "bf16"
    """How the linear layers of FLUX's blocks hold their weights: unquantized, in `precision` (`bf16`), or in 8 bits
    with a scale per output channel, dequantized for each product; see docs/weights.md. Part of the results: a run
    resumes with the same value."""
    placement: Placement = Placement()


Latents = Annotated[
    Literal["true", "predicted", "mix"], BeforeValidator(lambda value: "true" if value is True else value)
]
"""Which patch latents; YAML reads `true` as a boolean."""


class Connector(Section):
    queries: int = Field(default=64, ge=1)
    """Learnable query tokens, each of which becomes a text token of FLUX."""
    layers: int = Field(default=6, ge=1)
    """Blocks of the connector."""
    width: int | None = Field(default=None, ge=1)
    """Width of the blocks; null: FLUX's hidden width."""


FluxLayer = Literal["attention", "mlp", "modulation", "embedders"]
"""Kinds of FLUX's linear layers; see `ControlLora.targets`."""


class ControlLora(LowRank):
    targets: list[FluxLayer] = Field(default=list(get_args(FluxLayer)), min_length=1)
    """Kinds of linear layers with a pair: `attention`; `mlp`, with a single block's output layer; `modulation`, which
    scale and shift the norms; and `embedders`, before the blocks. The others are FLUX's alone."""


Bridge = Literal["latents_2d", "queries", "cross_attention"]


class ControlNet(Section):
    bridge: Bridge = "latents_2d"
    """How patch latents condition FLUX: `latents_2d`, as released, by the ControlNet; for comparison without one, as
    additional text tokens: `queries`, learnable 1-D queries of a connector that attend to the latents, or
    `cross_attention`, the latents themselves by a linear projection. `double`, `single`, `weights` and `norm` are
    for `latents_2d`."""
    connector: Connector = Connector()
    """Queries and connector of `bridge: queries`."""
    double: int = Field(default=4, ge=0)
    """Double blocks copied from FLUX."""
    single: int = Field(default=1, ge=0)
    """Single blocks copied from FLUX."""
    weights: Literal["full", "lora"] = "full"
    """Linear layers of the copied blocks and embeddings: `full`, all weights trained, or `lora`, the frozen FLUX's
    weights, not stored twice, with trained low-rank pairs. What FLUX does not have, and norms, are trained in both
    cases."""
    lora: ControlLora = ControlLora()
    """Low-rank pairs, for `weights: lora`."""
    norm: Literal["batch", "group"] = "batch"
    """Norm of the block that resamples patch latents: `batch`, as released, with statistics over the micro-batches of
    all ranks, so that results depend on `micro_batch`; or `group`."""
    latents: Latents = "true"
    """Patch latents that condition the ControlNet: `true`, the image's own; `predicted`, those that stage 1 decodes
    from the caption, as in generation, read from the cache of `bifrost data encode`; or `mix`, drawn per sample and
    epoch. See docs/stage2.md."""
    mllm: OptionalPlace = None
    """For `predicted` and `mix`: a stage-1 run, whose newest checkpoint is used, one of its checkpoints, or an export;
    EMA weights if there are any. A run resumes with the same weights."""
    decode_steps: int = Field(default=16, ge=1)
    """Decoding steps of predicted latents, up to the number of patches."""
    predicted_share: float = Field(default=0.5, ge=0, le=1)
    """Probability of predicted latents in `mix`."""

    @model_validator(mode="after")
    def _used(self) -> ControlNet:
        if self.bridge != "queries" and self.connector != Connector():
            raise ValueError(
                f"controlnet.connector has no effect with controlnet.bridge={self.bridge}; set bridge=queries, or leave"
                " it out"
            )
        if self.weights == "full" and self.lora != ControlLora():
            raise ValueError("controlnet.lora has no effect with controlnet.weights=full; set controlnet.weights=lora")
        if self.weights == "lora" and self.bridge != "latents_2d":
            raise ValueError(
                f"controlnet.weights=lora: controlnet.bridge={self.bridge} copies no weights of FLUX; leave it out"
            )
        return self

    @property
    def drawn_share(self) -> float:
        """Probability that a sample's latents are predicted."""
        return {"true": 0.0, "predicted": 1.0, "mix": self.predicted_share}[self.latents]
