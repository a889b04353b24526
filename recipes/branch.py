"""Settings of stage 1: the frozen MLLM, and the branch trained on it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from .fields import HeldWeights, OptionalPlace, Place
from .low_rank import LowRank
from .section import Section


class Backbone(Section):
    path: Place
    """Folder or hub id of a Qwen2.5-VL model, or `builtin:tiny`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to read; ignored for folders."""
    weights: HeldWeights = "bf16"
    """Stage 1: how the linear layers of the frozen text model hold their weights: unquantized, in `precision` (`bf16`),
    or in 8 bits, as `flux.weights`. The vision encoder, whose outputs are the targets, is never quantized."""
    placement: Literal["sharded", "replicated"] = "sharded"
    """Stage 1: whether the frozen text model and vision encoder are sharded over the ranks or replicated on each.
    Affects results only by rounding; a run may resume with another value."""
    vision_encoder: Literal["cached"] | None = None
    """Stage 1: `cached` reads the patch latents that `bifrost data encode` stored instead of loading the vision
    encoder; null: it is placed like the text model. A run may resume with another value."""


class MaskRate(Section):
    """Truncated normal from which the fraction of masked patches is drawn once per mask, as in MAR."""

    mean: float = 1.0
    """Mean of the normal before truncation."""
    std: float = Field(default=0.25, gt=0)
    """Standard deviation of the normal before truncation."""
    low: float = Field(default=0.7, ge=0, le=1)
    """Smallest fraction of masked patches."""
    high: float = Field(default=1.0, gt=0, le=1)
    """Largest fraction of masked patches."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskRate:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
"""Linear layers of a decoder layer."""


class Lora(LowRank):
    targets: list[Projection] = Field(default=list(PROJECTIONS), min_length=1)
    """Linear layers with a pair; the others are the text model's alone."""


Positions = Literal["learned", "mrope", "interleaved"]


class FlowHeadSettings(Section):
    layers: int = Field(default=3, ge=1)
    """Residual blocks."""
    width: int | None = Field(default=None, ge=1)
    """Width of the blocks; null: that of the latents. A narrower network cannot pass a whole noisy latent on."""
    steps: int = Field(default=10, ge=1)
    """Euler steps by which decoding samples a latent."""
    draws: int = Field(default=4, ge=1)
    """Noise draws per predicted token and step, over which the loss is averaged. They share the branch's pass."""


class Branch(Section):
    targets: Literal["native", "encoder", "vae", "pca", "random"] = "native"
    """What the branch predicts of a patch: `native`, the MLLM's own latent; for comparison, `encoder`, that of another
    vision encoder, `vae`, the latents of the VAE of `flux.path`, or linear functions of its pixels, their leading
    principal components (`pca`) or `random` directions. No ControlNet takes those."""
    encoder: OptionalPlace = None
    """For `targets: encoder`: folder or hub id of a Qwen2.5-VL, of which only the vision encoder is read, with as many
    patches per image as the MLLM's."""
    head: Literal["linear", "flow"] = "linear"
    """`linear`, as released, regresses a patch's latent, the mean of all that the caption allows; `flow` learns the
    distribution by flow matching, and decoding samples from it. See docs/stage1.md."""
    flow_head: FlowHeadSettings = FlowHeadSettings()
    """Shape, loss and sampling of a flow head."""
    init: Literal["copy", "random"] = "copy"
    """Initial weights of the branch's layers and final norm: `copy` of the text model's, as released, or `random`,
    drawn like those of an untrained Qwen."""
    layers: int | None = Field(default=None, ge=1)
    """Layers of the branch, at most as many as the text model has; null: as many. Fewer are copies of layers spread
    evenly over the text model, the last one included, and attend to the prefix of these."""
    weights: Literal["full", "lora"] = "full"
    """Linear layers of the branch: `full`, all weights trained, or `lora`, the frozen text model's weights, not stored
    twice, with trained low-rank pairs. Norms, mask token, position table and head are trained in both cases."""
    lora: Lora = Lora()
    """Low-rank pairs, for `weights: lora`."""
    positions: Positions = "learned"
    """`learned`: rotary position 0 and an additive table, as in the public release. `mrope`: Qwen's 3-D positions,
    which hardly separate columns. `interleaved`: the same, rows and columns on alternating frequencies."""
    loss_tokens: Literal["all", "masked"] = "all"
    """Patches over which the loss is averaged; `all` as in the public release."""
    mask_rate: MaskRate = MaskRate()
    """Distribution of the fraction of masked patches."""
    draws: int = Field(default=1, ge=1)
    """Masks per sample and step, over which the loss is averaged. They share vision encoder and text prefix; the branch
    has `micro_batch` x `draws` images per backward pass. See docs/stage1.md."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a caption is replaced by an empty one, for classifier-free guidance."""
    max_text_tokens: int = Field(default=300, ge=32)
    """Longest prompt in tokens, including the template; a longer caption is truncated, never the prompt's suffix."""

    @model_validator(mode="after")
    def _used(self) -> Branch:
        if self.targets == "encoder" and self.encoder is None:
            raise ValueError(
                "branch.targets=encoder needs branch.encoder, the model whose vision encoder makes the targets"
            )
        if self.targets != "encoder" and self.encoder is not None:
            raise ValueError("branch.encoder has no effect; set branch.targets=encoder, or leave it out")
        if self.head == "linear" and self.flow_head != FlowHeadSettings():
            raise ValueError("flow_head is for branch.head=flow; set that, or leave it out")
        if self.weights == "full" and self.lora != Lora():
            raise ValueError("branch.lora has no effect with branch.weights=full; set branch.weights=lora")
        if self.weights == "lora" and self.init == "random":
            raise ValueError(
                "branch.init=random: with branch.weights=lora the branch's weights are the text model's; leave it out"
            )
        return self
