"""The typed recipe: every setting of a run, each with its documentation.

Names and nesting are a public contract for cluster scripts. This module does not use files, devices or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from .batch import BatchSplit
from .branch import Backbone, Branch
from .data import Data
from .fields import NAME, OptionalPlace, Place, Shards, Trackers, TrackingUri
from .secrets import stored_secret
from .section import Section
from .stage2 import ControlNet, Flux
from .yaml_dialect import Dumper

Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    name: Literal["adamw", "adamw-8bit", "lion", "muon"] = "adamw"
    """Optimizer: torch's AdamW, AdamW with moments in 8 bits (pip install torchao), Lion (pip install lion-pytorch), or
    torch's Muon for the matrices of the layers with AdamW for the rest; see docs/optimizers.md."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    # Not strict, because a pair is a list in YAML and JSON; its elements are.
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's decay rates of the two moments; Lion's of the update and of the moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon; Lion has none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum, Nesterov's."""
    weight_decay: float = Field(default=0.02, ge=0)
    """Decoupled weight decay of matrices; none for norms, biases, mask token and position table."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps of linear warmup from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After warmup: constant at the peak, or cosine decay to zero at `steps`."""
    clip: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are clipped."""

    @model_validator(mode="after")
    def _used(self) -> Optimizer:
        fields = type(self).model_fields
        if self.name == "lion" and self.eps != fields["eps"].default:
            raise ValueError("eps: Lion has none; leave it out")
        if self.name != "muon" and self.momentum != fields["momentum"].default:
            raise ValueError("momentum: only Muon has one; leave it out, or set optimizer.name=muon")
        return self


class Ema(Section):
    decay: float = Field(default=0.9999, gt=0, lt=1)
    """Decay per step; at step n at most (1 + n) / (10 + n)."""


class Zero(Section):
    stage: Literal[3] = 3
    """ZeRO stage; weights, gradients and optimizer state are sharded over all ranks."""
    reduce_bucket: int = Field(default=500_000_000, gt=0)
    """Size of a gradient bucket, in elements."""
    prefetch_bucket: int = Field(default=50_000_000, ge=0)
    """Elements that are gathered ahead of use."""
    max_live_parameters: int = Field(default=1_000_000_000, gt=0)
    """Largest number of gathered elements before some are released."""
    persistence_threshold: int = Field(default=100_000, ge=0)
    """Parameters with up to this many elements stay gathered. A value above the largest parameter keeps all of them
    gathered between updates, so that the passes of a step gather nothing."""
    hpz: int | None = Field(default=None, ge=2)
    """Ranks per node, for ZeRO++ hpZ: a secondary copy of the sharded parameters is sharded within each node, so that
    only the first gather after an update crosses nodes."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass, on a separate GPU stream."""
    quantized_weights: bool = False
    """Gather weights in 8 bits (ZeRO++ qwZ): half the traffic, rounded weights; needs GPUs for which DeepSpeed's
    kernels build."""

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: object) -> object:
        """Recipes in older run folders contain `quantized_gradients`, which only allowed false."""
        if isinstance(values, dict) and "quantized_gradients" in values:
            values = dict(values)
            if values.pop("quantized_gradients") is not False:
                raise ValueError(
                    "quantized_gradients is no longer a setting: DeepSpeed reads gradients as fp16, and these are fp32;"
                    " leave it out"
                )
        return values


class Kernels(Section):
    head_backend: Literal["auto", "reference", "in-place", "triton", "triton-tma", "triton-tma-pair", "triton-ws"] = (
        "auto"
    )
    """Implementation of head and loss: plain PyTorch, a library GEMM with one fused pass, or one fused kernel; see
    docs/kernels.md. `auto` times them at startup on a GPU. All but `reference` also fuse mask mix and final norm."""
    attention: Literal["auto", "varlen", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa", "reference"] = "auto"
    """Implementation of attention: torch's own FlashAttention, that of a package, or plain torch; `auto` as above."""
    elementwise: Literal["torch", "liger"] = "torch"
    """Implementation of layer norms and SwiGLU: torch, or Liger's kernels (on a GPU, pip install liger-kernel)."""
    deterministic: bool = False
    """Deterministic algorithms on a GPU, in particular for attention's backward pass, so that a resumed run is bitwise
    equal to an uninterrupted one; slower. See docs/kernels.md."""


class Checkpoint(Section):
    every: int = Field(default=500, ge=1)
    """Steps between saves; the last step and a stop signal also save."""
    interval: Literal["fixed", "auto"] = "fixed"
    """`auto`: start with `every`, then use the interval that loses the least time, from the measured cost of a save and
    `mtbf_hours`."""
    mtbf_hours: float = Field(default=1000.0, gt=0)
    """Mean time between failures of one node, in hours, for `interval: auto`."""
    keep: int = Field(default=3, ge=1)
    """Number of newest checkpoints to keep."""
    local: OptionalPlace = None
    """Folder on each node's local disk to which a save is written first; after a crash the next attempt copies what is
    left there to the run folder."""
    upload: OptionalPlace = None
    """Address to which the checkpoints are copied as well, such as `s3://bucket/runs`, by a process of its own, while
    training continues; null disables it."""
    keep_best: bool = False
    """Also save at, and keep, the step with the lowest held-out loss: of the EMA weights if there are any."""
    max_failed_saves: int = Field(default=3, ge=1)
    """Consecutive failed saves after which the run stops; until then training continues."""


class Previews(Section):
    every: int | None = Field(default=None, ge=1)
    """Steps between previews of a fixed set of images, written to `previews/` in the run folder; null disables them."""
    count: int = Field(default=4, ge=1)
    """Number of images, from the first samples of the data."""
    controlnet: OptionalPlace = None
    """Stage 1 only: the stage-2 run or `flux_controlnet` folder that decodes the predicted latents to images."""
    flux: OptionalPlace = None
    """Stage 1 only: the FLUX model for a `flux_controlnet` folder."""


class Validation(Section):
    shards: Shards | None = None
    """Held-out shards, named like `data.shards`, none of which may be training data; null disables validation."""
    every: int = Field(default=500, ge=1)
    """Steps between validations; the last step validates too."""
    samples: int = Field(default=512, ge=1)
    """Number of samples, spread evenly over the shards. They are decoded once, and each rank keeps its share in host
    memory."""
    patience: int | None = Field(default=None, ge=1)
    """Consecutive validations without a lower loss after which the run ends; null: it never ends early."""


class Health(Section):
    spike_zscore: float | None = Field(default=10.0, gt=0)
    """Robust z-score of loss or gradient norm above which a step is skipped; null skips only non-finite steps."""
    window: int = Field(default=128, ge=8)
    """Number of previous steps, without skipped ones, for the z-score; spike detection starts after half as many."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Consecutive skipped steps after which the run rolls back to the last checkpoint before them and skips their
    samples."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks after which the run stops."""


class Watchdog(Section):
    """Timeouts from the end of one step to the end of the next. A run that exceeds one dumps the stacks of all ranks
    and exits with code 76."""

    step_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds for a regular step; null: 20 times the usual step time and at least 100 s, once five steps were timed."""
    startup_timeout_s: float = Field(default=1500.0, gt=0)
    """Seconds for startup, up to the end of the first step; all ranks have to join within a fifth of it."""
    save_timeout_s: float = Field(default=1500.0, gt=0)
    """Seconds for a step with additional work: a save, previews, a validation, a rollback."""


class Tracking(Section):
    enabled: bool = True
    """Mirror metrics.jsonl to trackers, each from a separate process."""
    to: Trackers = Field(default=["mlflow"])
    """Trackers: `mlflow`, `tensorboard` (files in the run folder; pip install tensorboard), `wandb` (offline without an
    API key; pip install wandb)."""
    uri: TrackingUri | None = None
    """MLflow tracking URI, without credentials; null uses MLFLOW_TRACKING_URI, or else a SQLite file in `runs_dir`."""
    experiment: str = "bifrost"
    """MLflow experiment, W&B project."""
    prometheus: OptionalPlace = None
    """Folder of the node exporter's textfile collector, or a file FOLDER/NAME.prom in it, for the latest values (pip
    install prometheus-client)."""


def _first(named: Mapping[str, object]) -> str | None:
    """The first name whose value is set."""
    return next((name for name, value in named.items() if value), None)


class Recipe(Section):
    stage: Literal["patch-latents", "controlnet"]
    """Model to train: `patch-latents`, the MLLM's visual generation branch, or `controlnet`, the latent ControlNet."""
    name: str = Field(pattern=NAME)
    """Name of the run and of its folder under `runs_dir`."""
    seed: int = Field(default=0, ge=0)
    """Seed of sample order, masks, caption dropout and initialization."""
    steps: int = Field(ge=1)
    """Total number of optimizer steps."""
    global_batch: int = Field(ge=1)
    """Samples per step, for any number of ranks."""
    micro_batch: int = Field(ge=1)
    """Samples per rank and backward pass."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; master weights and moments are always fp32."""
    activation_checkpointing: bool = True
    """Recompute the activations of each layer in the backward pass."""
    runs_dir: Place = "runs"
    """Folder that holds the run folders."""
    log_every: int = Field(default=10, ge=1)
    """Steps between metric lines."""
    init_from: OptionalPlace = None
    """Initial weights: a checkpoint in the public layout, or the folder of an earlier run."""
    backbone: Backbone
    branch: Branch = Branch()
    flux: Flux | None = None
    """The frozen FLUX of `controlnet`. Stage 1 has one only with `branch.targets: vae`, and reads `path`, `revision`
    and, as size of the images for the VAE, `image_size`."""
    controlnet: ControlNet = ControlNet()
    data: Data
    optimizer: Optimizer = Optimizer()
    ema: Ema | None = None
    """Moving average of the trainable weights, sharded like them; null disables it."""
    zero: Zero = Zero()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    previews: Previews = Previews()
    validation: Validation = Validation()
    health: Health = Health()
    watchdog: Watchdog = Watchdog()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _without_secrets(self) -> Recipe:
        if problem := stored_secret(self.model_dump(mode="json")):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _in_squares(self) -> Recipe:
        """What needs squares of one size, and is refused with `data.buckets`."""
        squares = {
            f"branch.targets={self.branch.targets}": self.branch.targets != "native",
            f"controlnet.bridge={self.controlnet.bridge}": self.controlnet.bridge != "latents_2d",
        }
        if self.data.buckets and (key := _first(squares)):
            raise ValueError(f"data.buckets: {key} is for squares of one size; set data.buckets=null, or change it")
        return self

    @model_validator(mode="after")
    def _with_source_images(self) -> Recipe:
        """What has no place for the source images of editing pairs."""
        without = {
            "stage controlnet": self.stage == "controlnet",
            "backbone.vision_encoder=cached": self.backbone.vision_encoder,
            f"branch.targets={self.branch.targets}": self.branch.targets != "native",
        }
        if self.data.edits and (key := _first(without)):
            raise ValueError(f"data.sources: task=editing is for stage 1 with the MLLM's vision encoder, not for {key}")
        return self

    @model_validator(mode="after")
    def _with_texts(self) -> Recipe:
        """What has no place for understanding sources."""
        if not self.data.understanding:
            return self
        if self.stage == "controlnet":
            raise ValueError("data.sources: task=understanding is for stage 1, whose base reads texts; leave it out")
        without = {
            "backbone.vision_encoder=cached": self.backbone.vision_encoder,
            f"branch.targets={self.branch.targets}": self.branch.targets != "native",
        }
        if any(source.asks for source in self.data.understanding) and (key := _first(without)):
            raise ValueError(f"data.sources: questions about images need the vision encoder, which {key} does without")
        return self

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if self.stage == "controlnet" and self.flux is None:
            raise ValueError("stage controlnet needs flux.path, such as flux.path=black-forest-labs/FLUX.1-dev")
        if self.stage == "patch-latents" and self.branch.targets == "vae" and self.flux is None:
            raise ValueError("branch.targets=vae needs flux.path, the FLUX whose VAE makes the targets")
        if self.stage == "controlnet":
            if self.controlnet.latents != "true" and self.controlnet.mllm is None:
                raise ValueError(
                    f"controlnet.latents={self.controlnet.latents} needs controlnet.mllm, the stage-1 run, checkpoint"
                    " or export that predicts them"
                )
            stage_1 = {
                "placement": self.backbone.placement != "sharded",
                "vision_encoder": self.backbone.vision_encoder,
            }
            if key := _first(stage_1):
                raise ValueError(
                    f"backbone.{key} is for stage 1; in stage controlnet set flux.placement.vision_encoder"
                )
        if self.stage == "controlnet" and self.backbone.weights != "bf16":
            raise ValueError(
                "backbone.weights is for stage 1's text model; stage controlnet uses the vision encoder alone, which is"
                " never quantized. For FLUX, set flux.weights"
            )
        if self.zero.quantized_weights and (key := self._gathered_in_8_bits()):
            raise ValueError(
                f"zero.quantized_weights: weights set by {key} are in 8 bits already; leave it off, or replicate them"
            )
        if self.branch.targets != "native":
            native = {"backbone.vision_encoder": self.backbone.vision_encoder, "previews.every": self.previews.every}
            if key := _first(native):
                raise ValueError(
                    f"{key} is for the MLLM's own latents, and branch.targets={self.branch.targets} is not"
                )
        if self.stage == "patch-latents" and self.previews.every and not self.previews.controlnet:
            raise ValueError("previews.every in stage patch-latents needs previews.controlnet to decode the latents")
        if self.validation.shards is None:
            asked = {"checkpoint.keep_best": self.checkpoint.keep_best, "validation.patience": self.validation.patience}
            if key := _first(asked):
                raise ValueError(f"{key} needs validation.shards, the held-out shards")
        return self

    def _gathered_in_8_bits(self) -> str | None:
        """The setting by which ZeRO-3 shards and gathers 8-bit weights."""
        if self.stage == "patch-latents":
            found = "backbone.weights", self.backbone.weights, self.backbone.placement
        else:
            assert self.flux is not None
            found = "flux.weights", self.flux.weights, self.flux.placement.transformer
        key, weights, placement = found
        return key if weights != "bf16" and placement == "sharded" else None

    def to_yaml(self) -> str:
        """All settings, defaults included, as YAML that `load_recipe` can read."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)

    def split(self, ranks: int) -> BatchSplit:
        """The global batch on `ranks` ranks. Raises ValueError when it does not divide evenly."""
        return BatchSplit(self.global_batch, self.micro_batch, ranks)
