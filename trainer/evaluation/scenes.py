"""Evaluation of scenes whose objects are known, by both stages or stage 1 alone: which objects the images show, with
controls.

Legend: B scenes, N patch latents of width D, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data import Dataset
from ...data.progress import progress
from ...data.scenes.grammar import Scene
from ...data.scenes.scorer import read, score, summarize
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator
from ..inference.latent_decoder import LatentDecoder
from ..inference.settings import Settings
from .data_sets import measures_edits
from .pixel_probe import PixelProbe
from .samples import SampleSet, shown_sources, stack
from .scene_samples import SceneSample, choose_scenes, prompts
from .understanding import Understanding

PROBE_IMAGES = 1000
"""Training images on which the probe is fitted, at most."""
PROBE_SCENES = 100
"""Held-out scenes per category that the probe reads, if there are as many and no more are asked for: without FLUX they
cost little."""
ENCODED = 64
"""Images encoded at once."""
CAPTION_LINES = 7
PARTS = {"heldout": "heldout", "train": "seen"}
"""Data set -> name of its scenes in the metrics."""


@dataclass
class SceneEvaluation:
    """Results of an evaluation by ground truth."""

    scenes: dict[str, dict[str, dict[str, dict[str, float]]]]
    """Part of the data (`heldout`, `seen`) -> control -> category -> scores; see docs/evaluation.md."""
    samples: dict[str, list[SceneSample]]
    """`train` and optionally `heldout`, by category."""
    image_seeds: dict[str, list[int]]
    contact_sheet: Image.Image
    edits: bool
    """Whether the samples are editing pairs, whose targets are the scenes."""
    understanding: Understanding | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """All metrics."""
        answers = {} if self.understanding is None else {"understanding": asdict(self.understanding)}
        return {"scenes": self.scenes, **answers}

    def record(self) -> dict[str, Any]:
        """The metrics, for metrics.json."""
        return {"task": "editing" if self.edits else "generation", **self.figures}


def evaluate_scenes(
    decoder: LatentDecoder,
    data: Dataset,
    heldout: Dataset | None,
    truth: Mapping[str, Scene],
    samples: int = 64,
    seed: int = 0,
    settings: Settings = Settings(),
    batch: int = 8,
) -> SceneEvaluation:
    """Scores of up to `samples` scenes of each category, the same scenes for the same seed; those of held-out scenes
    that need no FLUX, of up to PROBE_SCENES.

    decoder: a `Generator`, or stage 1 alone, which is scored by the probe.
    truth: the scenes by the keys of their samples. Held-out captions that are among the training captions are skipped.
    Data sets that require source images, both or none, are editing pairs. RunError if `truth` does not belong to the
    data, a category has fewer than two scenes, or stage 1 was not trained on pairs.
    """
    edits = measures_edits(decoder, data, heldout)
    generator = decoder if isinstance(decoder, Generator) else None
    sizes = decoder.image_size, generator.flux_size if generator else decoder.image_size
    shown_here = decoder.group.rank == 0
    train = SampleSet("train", data, seed, sizes)
    chosen: dict[str, list[SceneSample]] = {}
    if heldout is not None:
        held_out = SampleSet("heldout", heldout, seed, sizes)
        chosen["heldout"] = choose_scenes(held_out, truth, max(samples, PROBE_SCENES), prompts(train, truth))
    chosen["train"] = choose_scenes(train, truth, samples)
    with progress("fitting the probe", shown=shown_here):
        probe = PixelProbe(
            (_encode(decoder, images), images)
            for part in train.gallery(PROBE_IMAGES, ENCODED)
            for images in [stack([sample.seen for sample in part])]
        )
    latents = (2 if edits else 1) * sum(map(len, chosen.values()))
    with progress("decoding", latents, "latents", shown=shown_here) as shown:
        parts = {name: _Part.of(decoder, part, seed, settings, batch, shown.advance) for name, part in chosen.items()}
    drawn = {name: part.first(samples) for name, part in parts.items()}
    trials: dict[str, _Trial] = {}
    if generator is not None:
        images = sum(len(part.plans(settings)) * len(part.samples) for part in drawn.values())
        with progress("generating", images, "images", shown=shown_here) as shown:
            trials = {name: _Trial(generator, part, settings, batch, shown.advance) for name, part in drawn.items()}
    with progress("reading the objects of the images", shown=shown_here):
        figures = {PARTS[name]: part.scores(probe) for name, part in parts.items()}
        for name, trial in trials.items():
            figures[PARTS[name]] = {**trial.scores(), **figures[PARTS[name]]}
    first = next(iter(drawn))
    sheet = _sheet(drawn[first], trials[first].rows() if trials else drawn[first].rows(probe))
    seeds = {name: part.seeds for name, part in drawn.items()}
    return SceneEvaluation(figures, {name: part.samples for name, part in drawn.items()}, seeds, sheet, edits)


@dataclass
class _Part:
    """Scenes of one part of the data, whose categories follow one another, with the patch latents of their images and
    those that stage 1 decodes from their captions, both [scenes, N, D]; of editing pairs from the instructions with
    their own source images, and with another pair's."""

    samples: list[SceneSample]
    seeds: list[int]
    true: Tensor
    decoded: Tensor
    other_source: Tensor | None

    @classmethod
    def of(
        cls,
        decoder: LatentDecoder,
        samples: list[SceneSample],
        seed: int,
        settings: Settings,
        batch: int,
        made: Callable[[int], None],
    ) -> _Part:
        seeds = [seed + sample.index for sample in samples]
        true = _encode(decoder, stack([sample.seen for sample in samples]))
        decode = partial(decoder.decoded, [sample.caption for sample in samples], seeds, settings, batch, made)
        if (sources := shown_sources(samples)) is None:
            return cls(samples, seeds, true, decode(), None)
        other = [sources[number] for number in others([sample.scene for sample in samples])]
        return cls(samples, seeds, true, decode(sources), decode(other))

    @property
    def scenes(self) -> list[Scene]:
        return [sample.scene for sample in self.samples]

    def first(self, count: int) -> _Part:
        """The first `count` scenes of every category."""
        seen: Counter[str] = Counter()
        numbers = []
        for number, scene in enumerate(self.scenes):
            seen[scene.category] += 1
            if seen[scene.category] <= count:
                numbers.append(number)
        samples, seeds = ([each[number] for number in numbers] for each in (self.samples, self.seeds))
        other = None if self.other_source is None else self.other_source[numbers]
        return _Part(samples, seeds, self.true[numbers], self.decoded[numbers], other)

    def plans(self, settings: Settings) -> dict[str, tuple[Settings, Tensor | None]]:
        """Control -> settings and latents of its images."""
        alone = replace(settings, empty_prompt=True)
        return {
            "both": (settings, self.decoded),
            "latents_alone": (alone, self.decoded),
            "flux_alone": (replace(settings, controlnet=False), None),
            "true_latents": (alone, self.true),
            "swapped": (settings, self.true[others(self.scenes)]),
            **({} if self.other_source is None else {"other_source": (alone, self.other_source)}),
        }

    def scores(self, probe: PixelProbe) -> dict[str, dict[str, dict[str, float]]]:
        """Control without FLUX -> category -> scores."""
        scenes = self.scenes
        found = read(probe.images(self.decoded))
        figures = {
            "probe": summarize(found, scenes),
            "probe_true": summarize(read(probe.images(self.true)), scenes),
            "probe_shuffled": summarize(found, [scenes[number] for number in others(scenes)]),
        }
        if self.other_source is not None:
            figures["probe_other_source"] = summarize(read(probe.images(self.other_source)), scenes)
            figures["source"] = summarize(read(self.sources()), scenes)
        return figures

    def sources(self) -> list[Image.Image]:
        """The source images of editing pairs."""
        return [Image.fromarray(sample.source[1]) for sample in self.samples if sample.source]

    def rows(self, probe: PixelProbe) -> dict[str, list[Image.Image]]:
        """Images that need no FLUX, for the contact sheet."""
        rows = {"stage 1 by the probe": self.decoded, "true latents by the probe": self.true}
        return {label: [Image.fromarray(image) for image in probe.images(found)] for label, found in rows.items()}


class _Trial:
    """Images of the scenes of a part."""

    def __init__(
        self, generator: Generator, part: _Part, settings: Settings, batch: int, made: Callable[[int], None]
    ) -> None:
        self.scenes = part.scenes
        self.other = others(self.scenes)
        texts = [sample.caption for sample in part.samples]
        self.made = {
            control: generator.generate(texts, part.seeds, how, latents, batch, made)
            for control, (how, latents) in part.plans(settings).items()
        }

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Control -> category -> scores."""
        found = {control: read(images) for control, images in self.made.items()}
        other = [self.scenes[number] for number in self.other]
        figures = {
            control: summarize(each, other if control == "swapped" else self.scenes) for control, each in found.items()
        }
        figures["shuffled"] = summarize(found["both"], other)
        for category, row in figures["swapped"].items():
            numbers = [number for number, scene in enumerate(self.scenes) if scene.category == category]
            of_caption = [score(found["swapped"][number], self.scenes[number]) for number in numbers]
            of_latents = [score(found["swapped"][number], other[number]) for number in numbers]
            pairs = list(zip(of_latents, of_caption, strict=True))
            row["latents_win"] = fmean(latents.objects > caption.objects for latents, caption in pairs)
            row["caption_wins"] = fmean(caption.objects > latents.objects for latents, caption in pairs)
        return figures

    def rows(self) -> dict[str, list[Image.Image]]:
        """The images, for the contact sheet."""
        return {
            "FLUX alone": self.made["flux_alone"],
            "both stages": self.made["both"],
            "latents alone": self.made["latents_alone"],
            "another's latents": self.made["swapped"],
        }


def _sheet(part: _Part, rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Images of the first scene of every category, and the originals."""
    first = {scene.category: number for number, scene in reversed(list(enumerate(part.scenes)))}
    numbers = sorted(first.values())
    if sources := part.sources():
        rows = {"source image": sources, **rows}
    rows = {**rows, "original": [Image.fromarray(sample.original) for sample in part.samples]}
    shown = {label: [images[number] for number in numbers] for label, images in rows.items()}
    heads = [f"{part.scenes[number].category}: {part.samples[number].caption}" for number in numbers]
    return make_contact_sheet(shown, heads, across=len(numbers), lines=CAPTION_LINES)


def others(scenes: Sequence[Scene]) -> list[int]:
    """For each scene the number of the next one of its category, of the last one the first's."""
    members: dict[str, list[int]] = {}
    for number, scene in enumerate(scenes):
        members.setdefault(scene.category, []).append(number)
    following = {
        now: then for group in members.values() for now, then in zip(group, group[1:] + group[:1], strict=True)
    }
    return [following[number] for number in range(len(scenes))]


def _encode(decoder: LatentDecoder, images: Tensor) -> Tensor:
    """Patch latents [B, N, D] of uint8 images [B, 3, S, S]."""
    return torch.cat([decoder.encode(part) for part in images.split(ENCODED)])
