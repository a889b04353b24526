"""The stages of training: what a batch becomes, what is trained on it, and what the loop reports of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ...data.reader import Collate
from ...recipes import Recipe
from ..distributed.process_group import Ranks
from ..models.rng import IntArray
from ..models.weights import Source, WeightFiles


class Losses(NamedTuple):
    """Of one micro-batch: `loss` [] to differentiate, and detached `sums` [Stage.sums], for `Stage.report`, and `each`
    [B], the share of every sample in `loss`.

    A tuple, because ZeRO-3's hooks find tensors in nothing else.
    """

    loss: Tensor
    sums: Tensor
    each: Tensor


class StageModel(nn.Module):
    """What a stage trains, with the frozen parts that it needs."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def statistics(self) -> dict[str, Tensor]:
        """Name -> buffer of what training moves beside the weights, fp32 and equal on all ranks."""
        return {}


class Stage(Protocol):
    """One stage with everything that its recipe names, opened and checked; nothing is built yet."""

    recipe: Recipe
    sums: int
    """Entries of `Losses.sums`."""
    identity: tuple[str, ...]
    """Settings of its own that a run which goes on must not change."""

    @property
    def source(self) -> str:
        """The settings that name the frozen weights, with their values, for errors."""
        ...

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Pixels of a side of the images that `collate` takes."""
        ...

    def choose_kernels(self, ranks: Ranks, folder: Path) -> dict[str, dict[str, Any]]:
        """Decide what `build` computes with, the same on every rank; the record for `kernels.json`."""
        ...

    def build(self) -> StageModel:
        """The model, without weights; its forward takes `collate`'s arrays and `normalizer` and returns `Losses`."""
        ...

    def load(self, model: Any) -> None:
        """Fill a built model: frozen parts from their files, trained ones as they start."""
        ...

    def frozen(self) -> list[tuple[WeightFiles, list[str]]]:
        """The files of the frozen weights, and the names of those that the run uses."""
        ...

    def released(self, path: Path) -> tuple[Source, dict[str, str]]:
        """Trained weights in the public layout at `path`, and parameter -> name in them."""
        ...

    def collate(self) -> Collate: ...

    def normalizer(self, epoch: IntArray, index: IntArray, passes: int) -> float:
        """What each of `passes` backward passes (ranks x accumulation, which the engine averages over) divides its sum
        by, for the mean over the global batch of samples `epoch`, `index` [G]. A function of the plan alone, so that
        every rank knows it without asking."""
        ...

    def report(self, sums: list[float]) -> dict[str, float]:
        """Metrics from the sums over a step's micro-batches and ranks."""
        ...

    def tokens(self, sums: list[float]) -> float:
        """Tokens that a step went through."""
        ...


def open_stage(recipe: Recipe, for_counting: bool = False) -> Stage:
    """The recipe's stage; RunError says what cannot be used. for_counting: neither weights nor tokenizers are read."""
    if recipe.stage == "patch-latents":
        from .patch_latents import PatchLatentStage

        return PatchLatentStage.open(recipe, for_counting)
    from .controlnet import ControlNetStage

    stage = ControlNetStage.open(recipe, for_counting)
    stage.shape.require_use(stage.folder.transformer)
    return stage
