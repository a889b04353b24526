"""The data of a run: shards of one data set, or several sources in a fixed ratio."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .fields import NAME, OptionalPlace, Shards
from .section import Section


def source_name(value: str) -> str:
    """Names are part of the keys of metrics."""
    if not re.fullmatch(NAME, value):
        raise ValueError(f"{value!r} is not a name of a source; use letters, digits, `.`, `_` and `-`")
    return value


def weight_or_schedule(value: Any) -> float | dict[int, float] | None:
    """A weight above 0, or a schedule of weights, ordered by the global batch from which on each applies."""
    if value is None:
        return None
    if not isinstance(value, dict):
        if not _is_weight(value) or value == 0:
            raise ValueError(f"a weight is a number above 0, or a schedule such as {{0: 3, 1000: 1}} (got {value!r})")
        return float(value)
    found = {int(start): each for start, each in value.items() if re.fullmatch(r"\d+", str(start)) and _is_weight(each)}
    if len(found) < len(value) or 0 not in found:
        raise ValueError(
            "a schedule has numbers of global batches, 0 first, and weights of at least 0: {0: 3, 1000: 1} is 3, and 1"
            f" from the 1,001st batch on (got {value!r})"
        )
    return {start: float(found[start]) for start in sorted(found)}


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def caption_members(value: dict[str, float]) -> dict[str, float]:
    """Extensions of text members, as shards name them."""
    if not value:
        raise ValueError("no member named; give one such as {txt: 1}, or null for KEY.txt")
    for kind in value:
        if not kind or kind != kind.lower() or kind.startswith(".") or "/" in kind:
            raise ValueError(f"{kind!r} is not an extension; of KEY.short.txt it is short.txt, in lower case")
    return value


Captions = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(caption_members)]


def _is_question(kind: str) -> bool:
    """Whether members with this extension are questions with their answers, as data/texts.py reads them."""
    return kind.rpartition(".")[2] == "json"


Task = Literal["generation", "editing", "understanding"]


class Source(Section):
    """One of several data sets."""

    name: Annotated[str, AfterValidator(source_name)]
    """Name of the source in metrics and messages."""
    shards: Shards
    """Its shards, named like `data.shards`."""
    task: Task = "generation"
    """What its samples train: `generation`, an image from its caption; stage 1 also `editing`, an image from a source
    image, KEY.source.jpg, and an instruction. `understanding` trains nothing: the frozen base's own loss on its texts,
    or answers to questions, is reported. See docs/data.md."""
    weight: Annotated[float | dict[int, float] | None, BeforeValidator(weight_or_schedule)] = None
    """Its share of the samples, relative to the weights of the other sources; or a schedule, `{0: 3, 1000: 0}`: the
    weight by the number of global batches before. 0 is none of it, in a schedule only."""
    repeats: float | None = Field(default=None, gt=0)
    """Instead of weights: epochs of this source per epoch of the mixture, so that its share is in proportion to its
    samples; null is 1."""
    captions: Captions | None = None
    """Its captions, like `data.captions`; null: those."""
    caption_dropout: float | None = Field(default=None, ge=0, le=1)
    """Probability that one of its captions is replaced by an empty one; null: that of the stage,
    `branch.caption_dropout` or `flux.caption_dropout`."""
    batches_per_step: float | None = Field(default=None, gt=0)
    """With `task: understanding`, in place of a weight: batches of `global_batch` samples per training step, such as
    0.01 for one in 100 steps."""

    @property
    def asks(self) -> bool:
        """Whether its texts are questions with their answers."""
        return self.task == "understanding" and any(map(_is_question, self.captions or ()))

    @model_validator(mode="after")
    def _of_its_task(self) -> Source:
        if self.task != "understanding":
            if self.batches_per_step is not None:
                raise ValueError(f"{self.name}: batches_per_step is for task=understanding; give a weight instead")
            return self
        trained = {"weight": self.weight, "repeats": self.repeats, "caption_dropout": self.caption_dropout}
        if key := next((key for key, value in trained.items() if value is not None), None):
            raise ValueError(f"{self.name}: {key} is for sources that are trained on; leave it out")
        if self.batches_per_step is None:
            raise ValueError(f"{self.name}: task=understanding needs batches_per_step, such as 0.01")
        if self.asks and not all(map(_is_question, self.captions or ())):
            raise ValueError(f"{self.name}: captions name texts and questions; make two sources of them")
        return self

    def weight_at(self, batch: int) -> float | None:
        """The weight in global batch `batch`, counted from 0."""
        if not isinstance(self.weight, dict):
            return self.weight
        return next(each for start, each in reversed(self.weight.items()) if start <= batch)


RATIO = r"([1-9]\d?)[x:]([1-9]\d?)"
"""Pattern of a ratio, width by height."""


def ratio(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(RATIO, value):
        raise ValueError(
            f"{value!r} is not a ratio; write width and height such as 4x3 (YAML reads 4:3 without quotes as a number)"
        )
    return value


class Buckets(Section):
    """Shapes of images, by their ratios and areas; see docs/data.md."""

    ratios: list[Annotated[str, BeforeValidator(ratio)]] = Field(min_length=1)
    """Ratios of width and height, such as `[1x1, 4x3, 3x4]`. An image is cropped to the nearest one."""
    areas: list[int] | None = Field(default=None, min_length=1)
    """Areas of the shapes, each the side of a square like `image_size`; an image is in the largest for which it need
    not be enlarged too much. Null: `image_size` alone."""
    max_upscale: float = Field(default=2.0, ge=1)
    """Largest factor by which an image is enlarged in training, for the larger of its two sizes; one too small for
    the smallest area is left out."""

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """The ratios as width and height."""
        found = (re.fullmatch(RATIO, text) for text in self.ratios)
        return [(int(each[1]), int(each[2])) for each in found if each]


class Data(Section):
    shards: Shards | None = None
    """Training shards: a path, folder or URL, with braces and wildcards expanded, or a list of these."""
    sources: list[Source] | None = Field(default=None, min_length=1)
    """Several data sets in a fixed ratio, instead of `shards`; see docs/data.md."""
    captions: Captions | None = None
    """Members of a sample of which one is its caption, with weights, such as `{txt: 3, short.txt: 1}`: drawn per sample
    and epoch among those that it has. Null: KEY.txt. See docs/data.md."""
    index_dir: OptionalPlace = None
    """Folder or URL with the indexes of all shards, and their catalogues and caches, which are otherwise next to them:
    for shards that are read-only. See docs/data.md."""
    image_size: int = Field(default=448, gt=0)
    """Side in pixels of the square image given to the vision encoder; a multiple of patch size x merge size (28)."""
    buckets: Buckets | None = None
    """Images in several shapes instead of squares, one shape per global batch; null: squares."""
    workers: int = Field(default=4, ge=0, le=128)
    """Loader processes per rank; 0 reads in the training process."""
    prefetch: int = Field(default=2, ge=1)
    """Micro-batches prefetched by each worker."""
    shuffle_window: int = Field(default=16, ge=1)
    """Number of shards that are shuffled together and open at the same time."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest fraction of unreadable samples; above it the run stops and counts the reasons."""

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        if self.shards is None and self.sources is None:
            raise ValueError(
                "no shards named; give a path such as data.shards=/data/train-{00000..00099}.tar, or data.sources"
            )
        if self.shards is not None and self.sources is not None:
            raise ValueError("shards and sources exclude each other; set one of them to null")
        names = Counter(source.name for source in self.sources or ())
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"sources: {repeated[0]} is the name of {names[repeated[0]]} of them; rename one")
        if self.sources and not self.trained:
            raise ValueError("sources: all have task=understanding; add one that is trained on")
        weighted = [source.weight is not None for source in self.trained]
        if any(weighted) and (not all(weighted) or any(source.repeats is not None for source in self.trained)):
            raise ValueError("sources: give every one a weight and none repeats, or none a weight")
        for batch in self.changes:
            if self.sources and not any(source.weight_at(batch) != 0 for source in self.trained):
                raise ValueError(f"sources: from global batch {batch} on, all weights are 0")
        return self

    @property
    def trained(self) -> list[Source]:
        """The sources that are trained on."""
        return [source for source in self.sources or () if source.task != "understanding"]

    @property
    def understanding(self) -> list[Source]:
        """The sources on which the frozen base's loss is reported."""
        return [source for source in self.sources or () if source.task == "understanding"]

    @property
    def changes(self) -> list[int]:
        """Global batches at which scheduled weights change, the first one 0."""
        starts = (source.weight for source in self.sources or () if isinstance(source.weight, dict))
        return sorted({0}.union(*starts))

    @property
    def edits(self) -> bool:
        """Whether a source has editing pairs."""
        return any(source.task == "editing" for source in self.sources or ())

    @property
    def only_edits(self) -> bool:
        """Whether every sample that is trained on is an editing pair."""
        return bool(self.trained) and all(source.task == "editing" for source in self.trained)

    @property
    def named(self) -> list[str]:
        """All shards, as the recipe names them."""
        specs = [source.shards for source in self.sources] if self.sources else [self.shards or []]
        return [one for spec in specs for one in ([spec] if isinstance(spec, str) else spec)]

    @property
    def caption_members(self) -> set[str]:
        """Members that captions are read from, of all sources."""
        used = [source.captions or self.captions for source in self.trained] if self.sources else [self.captions]
        return {kind for captions in used for kind in captions or {"txt": 1.0}}

    def weights(self, samples: list[int], batch: int = 0) -> list[Fraction]:
        """The exact share of each of the `trained` sources in global batch `batch`, up to a common factor; samples:
        their numbers of samples."""
        given = [(source, source.weight_at(batch)) for source in self.trained]
        return [
            Fraction(repr(own)) if own is not None else count * Fraction(repr(source.repeats or 1))
            for (source, own), count in zip(given, samples, strict=True)
        ]
