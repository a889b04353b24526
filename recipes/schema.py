"""The typed recipe: every setting of a run, with one sentence of documentation each.

Names and nesting are the contract with cluster scripts. Nothing here touches a file, a device or torch.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from braceexpand import braceexpand
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .secrets import stored_secret

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""A run's name, which is its folder's."""


def _given(value: object) -> object:
    return "" if value is None else value  # YAML's reading of `data.shards=`


def _shards(value: str | list[str]) -> str | list[str]:
    """Shards as they can be named; whether there are any is for those to find out who read them."""
    every = [value] if isinstance(value, str) else value
    if not every or not all(one.strip() for one in every):
        raise ValueError("no shards named; give a path such as /data/train-{00000..00099}.tar")
    for one in every:
        try:
            next(braceexpand(one))
        except ValueError as error:
            raise ValueError(f"{one}: {error}; write ranges as {{00000..02047}}") from None
    return _place(value) if isinstance(value, str) else [_place(one) for one in value]


def _place(value: str) -> str:
    """A path with `~` expanded. A shell does so only at the beginning of a word, not in `data.shards=~/x`, and nothing
    does in YAML; whoever removes a folder that is named `~` may remove their home."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"{value}: no home folder is known for {value.split('/')[0]}; write the path out")
    if variable := re.match(r"\$\{?\w+\}?", path):
        raise ValueError(f"{value}: {variable[0]} is not expanded in a recipe; write the path out")
    return path


Place = Annotated[str, AfterValidator(_place)]
OptionalPlace = Place | None


class Section(BaseModel):
    """A group of settings: unknown keys are refused, and so are values of another type; an integer is a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Backbone(Section):
    path: Place
    """Folder or hub id of a Qwen2.5-VL model, or `builtin:tiny`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to read; ignored for folders."""
    placement: Literal["sharded", "replicated"] = "sharded"
    """Stage 1: whether the frozen text model and vision tower are cut over the ranks or lie whole on every one. No
    result depends on it beyond rounding, and a run may go on with another."""


class MaskRate(Section):
    """Truncated normal that the share of masked patches is drawn from, once a sample (MAR's rule)."""

    mean: float = 1.0
    """Mean of the normal before truncation."""
    std: float = Field(default=0.25, gt=0)
    """Standard deviation of the normal before truncation."""
    low: float = Field(default=0.7, ge=0, le=1)
    """Smallest share of patches masked."""
    high: float = Field(default=1.0, gt=0, le=1)
    """Largest share of patches masked."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskRate:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Branch(Section):
    positions: Literal["learned", "mrope"] = "learned"
    """`learned`: rotary position 0 and an additive table, as the public release; `mrope`: Qwen's own 3-D positions."""
    loss_tokens: Literal["all", "masked"] = "all"
    """Which patches the loss averages over; `all` is what the public release computes."""
    mask_rate: MaskRate = MaskRate()
    """Distribution of the share of masked patches."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a caption is replaced by the empty one, for classifier-free guidance."""
    max_text_tokens: int = Field(default=300, ge=32)
    """Longest prompt in tokens, template included; a longer caption loses its end, never the prompt's suffix."""


class Placement(Section):
    """Where the frozen parts lie: cut over the ranks, whole on every rank, whole in host memory and on the device only
    while at work, or not at all, with `bifrost data encode` having stored what they compute. No result depends on it
    beyond rounding, and a run may go on with another."""

    transformer: Literal["sharded", "replicated"] = "sharded"
    """FLUX itself."""
    vae: Literal["sharded", "replicated", "offloaded", "cached"] = "sharded"
    """FLUX's VAE."""
    text: Literal["sharded", "replicated", "offloaded", "cached"] = "sharded"
    """FLUX's text encoders, T5 and CLIP; cached, T5's states are megabytes a sample."""
    vision_encoder: Literal["sharded", "replicated", "offloaded"] = "sharded"
    """The MLLM's vision tower."""


class Flux(Section):
    path: Place
    """Folder or hub id of a FLUX.1 model as diffusers lays it out, or `builtin:tiny-flux`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to read; ignored for folders."""
    image_size: int = Field(default=512, gt=0)
    """Side of the square that FLUX paints, in pixels; a multiple of 16, or of what its VAE asks for."""
    guidance: float = Field(default=3.5, ge=0)
    """Guidance scale that FLUX and the ControlNet are told while training; schnell takes none."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a caption is replaced by the empty one."""
    placement: Placement = Placement()


class ControlNet(Section):
    double: int = Field(default=4, ge=0)
    """Double blocks copied from FLUX."""
    single: int = Field(default=1, ge=0)
    """Single blocks copied from FLUX."""
    norm: Literal["batch", "group"] = "batch"
    """Norm of the block that resamples patch latents: `batch`, as released, whose statistics go over `micro_batch` of
    all ranks and so depend on it, or `group`."""


class Data(Section):
    shards: Annotated[str | list[str], BeforeValidator(_given), AfterValidator(_shards)]
    """Training shards: a path, folder or URL, braces and wildcards expanded; several as a list."""
    image_size: int = Field(default=448, gt=0)
    """Side of the square the vision tower sees, in pixels; a multiple of patch size x merge size (28)."""
    workers: int = Field(default=4, ge=0, le=128)
    """Loader processes a rank; 0 reads in the training process."""
    prefetch: int = Field(default=2, ge=1)
    """Micro-batches each worker prepares ahead."""
    shuffle_window: int = Field(default=16, ge=1)
    """Shards that are shuffled together and so open at a time."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unreadable samples before the run stops with their list."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    # Not strict: a pair is a list in YAML and JSON. What is in it is.
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), strict=False)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator offset."""
    weight_decay: float = Field(default=0.02, ge=0)
    """Decoupled decay of matrices; norms, biases, mask token and position table have none."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: keep the peak, or fall to zero over `steps` along a cosine."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class Ema(Section):
    decay: float = Field(default=0.9999, gt=0, lt=1)
    """Share of the average kept at each step; at the n-th at most (1 + n) / (10 + n)."""


class Zero(Section):
    stage: Literal[3] = 3
    """ZeRO stage; weights, gradients and optimizer are sharded over all ranks."""
    reduce_bucket: int = Field(default=500_000_000, gt=0)
    """Elements a gradient bucket holds before it is reduced."""
    prefetch_bucket: int = Field(default=50_000_000, ge=0)
    """Elements gathered ahead of use."""
    max_live_parameters: int = Field(default=1_000_000_000, gt=0)
    """Gathered elements kept before the coordinator frees some."""
    persistence_threshold: int = Field(default=100_000, ge=0)
    """Parameters up to this many elements stay gathered; a number above the largest keeps all of them gathered from one
    update to the next, so that passes of one step gather nothing."""
    hpz: int | None = Field(default=None, ge=2)
    """Ranks of a node, for ZeRO++ hpZ: all that is cut is cut a second time within each node, and only the first gather
    after an update leaves the node."""
    overlap_comm: bool = False
    """Reduce gradients beside the backward pass, on a GPU stream of their own."""
    quantized_weights: bool = False
    """Send weights in 8 bits (ZeRO++ qwZ): half the bytes, weights rounded; on GPUs where DeepSpeed's kernels build."""
    quantized_gradients: bool = False
    """Send gradients in 4 bits (ZeRO++ qgZ); refused, with the reason, where DeepSpeed cannot do so rightly."""


class Kernels(Section):
    head_backend: Literal["auto", "reference", "in-place", "triton", "triton-tma", "triton-ws"] = "auto"
    """What computes head and loss: plain PyTorch, a library GEMM with one fused pass, or one fused kernel; see
    docs/kernels.md. `auto` measures at start-up on a GPU. All but `reference` also fuse mask mix and final norm."""
    attention: Literal["auto", "varlen", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa", "reference"] = "auto"
    """What computes attention: torch's own FlashAttention, that of a package, or plain torch; `auto` as above."""
    elementwise: Literal["torch", "liger"] = "torch"
    """What computes the layers' norms and SwiGLU: torch, or Liger's kernels (on a GPU, pip install liger-kernel)."""
    deterministic: bool = False
    """On a GPU, add up in a fixed order everywhere, attention's backward pass above all, so that a resumed run equals
    an undisturbed one to the bit; slower. See docs/kernels.md."""


class Checkpoint(Section):
    every: int = Field(default=500, ge=1)
    """Steps between saves; the last step and a stop signal save as well."""
    interval: Literal["fixed", "auto"] = "fixed"
    """`auto`: begin with `every`, then the interval that loses least time, by the measured cost and `mtbf_hours`."""
    mtbf_hours: float = Field(default=1000.0, gt=0)
    """Mean time between failures of one node, in hours, for `interval: auto`."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""
    local: OptionalPlace = None
    """Folder on each node's own disk that a save goes to first; a start brings what a crash left there to the run."""
    max_failed_saves: int = Field(default=3, ge=1)
    """Saves in a row that the storage may refuse before the run stops; until then training goes on."""


class Previews(Section):
    every: int | None = Field(default=None, ge=1)
    """Steps between pictures of a fixed set, written to `previews/` in the run folder; null makes none."""
    count: int = Field(default=4, ge=1)
    """Pictures: of the first samples of the data."""
    controlnet: OptionalPlace = None
    """Stage 1 alone: the stage-2 run or `flux_controlnet` folder that paints the predicted latents."""
    flux: OptionalPlace = None
    """Stage 1 alone: the FLUX of a `flux_controlnet` folder."""


class Health(Section):
    spike_zscore: float | None = Field(default=10.0, gt=0)
    """Robust z-score of loss or gradient norm above which a step is skipped; null skips non-finite ones alone."""
    window: int = Field(default=128, ge=8)
    """Steps, skipped ones left out, that a spike is measured against; none is called before there are half as many."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Skipped steps in a row after which the run goes back to the last checkpoint before them, past their samples."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Times that a run may do so before it stops."""


class Watchdog(Section):
    """Bounds on the time from one step's end to the next. A run that exceeds one is ended with all ranks' stacks and
    exit code 76."""

    step_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds for an ordinary step; null takes 20 usual ones and at least 100 s, once five steps have been timed."""
    startup_timeout_s: float = Field(default=1500.0, gt=0)
    """Seconds for the start, up to the end of its first step; all ranks have to come within a fifth of it."""
    save_timeout_s: float = Field(default=1500.0, gt=0)
    """Seconds for a step with work beside it: a save, pictures, a roll-back."""


class Tracking(Section):
    enabled: bool = True
    """Mirror metrics.jsonl to MLflow from a process of its own."""
    uri: OptionalPlace = None
    """MLflow tracking URI, without a login; null takes MLFLOW_TRACKING_URI, or else a SQLite file in `runs_dir`."""
    experiment: str = "bifrost"
    """MLflow experiment."""


class Recipe(Section):
    stage: Literal["patch-latents", "controlnet"]
    """What is trained: `patch-latents`, the MLLM's visual generation branch, or `controlnet`, the latent ControlNet."""
    name: str = Field(pattern=NAME)
    """Name of the run and of its folder under `runs_dir`."""
    seed: int = Field(default=0, ge=0)
    """Seed of sample order, masks, caption dropout and initialisation."""
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1)
    """Samples a step, whatever the number of ranks."""
    micro_batch: int = Field(ge=1)
    """Samples a rank and backward pass."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; masters and moments are fp32 in both."""
    activation_checkpointing: bool = True
    """Recompute each layer's activations in the backward pass."""
    runs_dir: Place = "runs"
    """Folder that holds the run folders."""
    log_every: int = Field(default=10, ge=1)
    """Steps between metric lines."""
    init_from: OptionalPlace = None
    """Start from these weights: a checkpoint in the public layout, or an earlier run's folder."""
    backbone: Backbone
    branch: Branch = Branch()
    flux: Flux | None = None
    """The frozen FLUX of `controlnet`."""
    controlnet: ControlNet = ControlNet()
    data: Data
    optimizer: Optimizer = Optimizer()
    ema: Ema | None = None
    """Average of the trainable weights, sharded like them; null keeps none."""
    zero: Zero = Zero()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    previews: Previews = Previews()
    health: Health = Health()
    watchdog: Watchdog = Watchdog()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _without_secrets(self) -> Recipe:
        if problem := stored_secret(self.model_dump(mode="json")):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if self.stage == "controlnet" and self.flux is None:
            raise ValueError("stage controlnet needs flux.path, such as flux.path=black-forest-labs/FLUX.1-dev")
        if self.stage == "controlnet" and self.backbone.placement != "sharded":
            raise ValueError("backbone.placement is stage 1's; in stage controlnet set flux.placement.vision_encoder")
        if self.stage == "patch-latents" and self.previews.every and not self.previews.controlnet:
            raise ValueError(
                "previews.every in stage patch-latents needs previews.controlnet, which paints the latents"
            )
        return self

    def accumulation(self, ranks: int) -> int:
        """Backward passes a step on `ranks` ranks; ValueError when the batch does not divide."""
        per_pass = self.micro_batch * ranks
        if self.global_batch % per_pass:
            fits = [b for b in range(1, self.global_batch + 1) if self.global_batch % (b * ranks) == 0]
            near = min(fits, key=lambda b: abs(b - self.micro_batch), default=None)
            remedy = (
                f"set micro_batch={near}"
                if near
                else f"set global_batch to a multiple of {ranks}, such as {-(-self.global_batch // ranks) * ranks}"
            )
            raise ValueError(
                f"global_batch {self.global_batch} does not divide by micro_batch {self.micro_batch} x {ranks} ranks:"
                f" {remedy}"
            )
        return self.global_batch // per_pass
