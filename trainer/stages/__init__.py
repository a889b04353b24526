"""The training stages: collation of a batch, the model trained on it, and the reported metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from ...data import Dataset
from ...data.bucket_rule import BucketRule
from ...data.reader import Collate
from ...recipes import Recipe
from ...recipes.schema import ControlNet, Kernels
from ..distributed.process_group import Ranks
from ..models.rng import IntArray
from ..models.weights import Source, WeightFiles
from .caption_dropout import CaptionDropout
from .latent_cache import FrozenWeights, Predictor

if TYPE_CHECKING:
    from .controlnet import ControlNetStage
    from .patch_latents import PatchLatentStage


VALIDATION_SEED = 0
"""Seed of the draws for held-out samples, whatever the run's seed is."""


OpenPredictor = Callable[[ControlNet, int, str, tuple[int, int], BucketRule | None], Predictor]
"""Opens what `controlnet.mllm` predicts: settings, seed, precision, N and D of a square's patch latents [B, N, D], and
the rule of stage 2's buckets."""


class Losses(NamedTuple):
    """Losses of a micro-batch: `loss` [] to differentiate, detached `sums` [Stage.sums] for `Stage.report`, and `each`
    [B], the contribution of every sample to `loss`.

    A tuple, because ZeRO-3's hooks find tensors only in tuples.
    """

    loss: Tensor
    sums: Tensor
    each: Tensor


class StageModel(nn.Module):
    """The trained module of a stage with its frozen parts."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> trainable parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def statistics(self) -> dict[str, Tensor]:
        """Name -> buffer that belongs to the weights: BatchNorm's, which training updates, or the latents' mean and
        deviation, measured before the first step. fp32 and equal on all ranks."""
        return {}

    @property
    def batch_statistics(self) -> bool:
        """Whether results depend on the number of samples per pass, by BatchNorm."""
        return False


class Stage(Protocol):
    """A stage whose models and folders are opened and checked; nothing is built yet."""

    sums: int
    """Entries of `Losses.sums`."""
    identity: tuple[str, ...]
    """Settings of the stage that must not change when a run resumes."""

    @property
    def source(self) -> str:
        """The config keys of the frozen weights with their values, for errors."""
        ...

    @property
    def text_limit(self) -> str:
        """How much of a caption is read, with the setting."""
        ...

    @property
    def bucket_rule(self) -> BucketRule | None:
        """With `data.buckets`, in which bucket an image is; None: all images are squares."""
        ...

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Side lengths in pixels of the images that `collate` expects, if these are squares."""
        ...

    def choose_kernels(
        self, asked: Kernels, micro_batch: int, precision: str, ranks: Ranks, folder: Path
    ) -> dict[str, dict[str, Any]]:
        """Select the kernels for `build`, equal on every rank; returns the record for `kernels.json`, which is in the
        run folder `folder`."""
        ...

    def build(self, activation_checkpointing: bool = False) -> StageModel:
        """The model, without weights; its forward takes `collate`'s arrays and `normalizer` and returns `Losses`."""
        ...

    def load(self, model: Any) -> None:
        """Fill a built model: frozen parts from their files, trained parts with initial weights."""
        ...

    def frozen(self) -> list[tuple[WeightFiles, list[str]]]:
        """The files of the frozen weights, and the names of the weights used."""
        ...

    def predicting(self) -> list[tuple[FrozenWeights, list[str]]]:
        """The same for weights of another stage, whose cached predictions are an input. RunError if some cannot be
        read."""
        ...

    def from_public_checkpoint(self, path: Path) -> tuple[Source, dict[str, str]]:
        """Trained weights in the public layout at `path`, and parameter -> name in them."""
        ...

    def collate(self, dataset: Dataset) -> Collate:
        """Items of a micro-batch of `dataset` -> arguments of the model."""
        ...

    def dropout(self, dataset: Dataset) -> CaptionDropout:
        """Which captions `collate` drops of items of `dataset`."""
        ...

    def validation_collates(self, shards: str | list[str], ranks: Ranks) -> dict[str, Collate]:
        """Name -> collate function of each mask rate or noise level at which the loss on the held-out `shards` is
        measured: without dropped captions, and with draws that depend on an item's index only. Every rank calls it."""
        ...

    def mean_loss(self, sums: list[float]) -> float:
        """The held-out loss from summed `Losses.sums`: the mean over the masked patches, or over FLUX's latents."""
        ...

    def normalizer(self, epoch: IntArray, index: IntArray, passes: int, bucket: int = 0) -> float:
        """Divisor of the loss sum of each of `passes` backward passes (ranks x accumulation, over which the engine
        averages) that gives the mean over the global batch of samples `epoch`, `index` [G], all of `bucket`. A function
        of the plan only, so that no communication is needed."""
        ...

    def report(self, sums: list[float]) -> dict[str, float]:
        """Metrics from the sums over the micro-batches and ranks of a step. `captions_truncated` are captions beyond
        `text_limit`; without it, captions are read from a cache."""
        ...

    def tokens(self, sums: list[float]) -> float:
        """Tokens processed in a step."""
        ...


def open_stage(recipe: Recipe, for_counting: bool = False, predictor: OpenPredictor | None = None) -> Stage:
    """The recipe's stage; RunError names what cannot be used. for_counting: read no weights or tokenizers. predictor:
    of packages above this one, needed to train or encode with predicted latents."""
    if recipe.stage == "patch-latents":
        return open_patch_latents(recipe, for_counting)
    stage = open_controlnet(recipe, for_counting, predictor)
    stage.shape.require_use(stage.folder.transformer)
    return stage


def open_patch_latents(recipe: Recipe, for_counting: bool = False) -> PatchLatentStage:
    """Stage 1; see `open_stage`."""
    from .patch_latents import PatchLatentStage

    opened = recipe.backbone, recipe.branch, recipe.data, recipe.seed, recipe.precision, recipe.flux
    return PatchLatentStage.open(*opened, for_counting)


def open_controlnet(
    recipe: Recipe, for_counting: bool = False, predictor: OpenPredictor | None = None
) -> ControlNetStage:
    """Stage 2, of which some blocks may have no effect; see `open_stage`."""
    from .controlnet import ControlNetStage

    assert recipe.flux is not None, "required by the recipe schema"
    stage = ControlNetStage.open(
        recipe.backbone,
        recipe.flux,
        recipe.controlnet,
        recipe.data,
        recipe.seed,
        recipe.precision,
        previews=recipe.previews.every is not None,
        for_counting=for_counting,
    )
    if predictor and recipe.controlnet.latents != "true":
        settings = recipe.controlnet, recipe.seed, recipe.precision
        stage.predictor = predictor(*settings, stage.condition, stage.bucket_rule)
    return stage
