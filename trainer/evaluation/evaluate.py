"""Evaluation of both stages on a data set: latents, reconstructions, and whether images match their prompts, which are
captions, or instructions with their source images.

Legend: B samples, N patch latents of width D, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...data import Dataset
from ...data.progress import progress
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator, to_images
from ..inference.masked_decoding import NO_EPOCH, draw_latent_noise, predict
from ..inference.mllm import prompt_prefix
from ..inference.settings import Settings
from ..models.draws import gaussian
from ..models.masking import draw_masks
from ..models.rng import Stream, uniform
from .data_sets import measures_edits
from .image_metrics import NearestPixels, centred_cosine, frechet, recall
from .reconstruction import SHEET_COLUMNS, fidelity, similarity
from .samples import GALLERY, Sample, choose_sets, shown_sources, stack

MASK_RATES = (0.7, 0.8, 0.9, 1.0)
RECONSTRUCTIONS = {"": "ground_truth", "latents_alone_": "latents_alone"}
"""Prefix of the metrics -> images from the true latents, with the caption and with the empty prompt."""
EDITED = {"": "full", "empty_prompt_": "empty_prompt", "other_source_": "other_source", "source_": "source"}
"""Prefix of the metrics -> images that are compared with the targets of edits, the source images among them."""


@dataclass
class Evaluation:
    """Results of an evaluation."""

    figures: dict[str, dict[str, Any]]
    """For `train` and optionally `heldout`: `latents`, `reconstruction`, `match`, `frechet`, and of editing pairs
    `editing`; see docs/evaluation.md."""
    samples: dict[str, list[Sample]]
    image_seeds: dict[str, list[int]]
    gallery: int
    """Number of images among which reconstructions were looked up."""
    contact_sheet: Image.Image
    edits: bool = False
    """Whether the samples are editing pairs."""

    def record(self) -> dict[str, Any]:
        """The metrics, for metrics.json."""
        chance = 1 / len(self.samples["train"])
        task = "editing" if self.edits else "generation"
        return {"task": task, "figures": self.figures, "chance": chance, "gallery": self.gallery}


@torch.no_grad()
def evaluate(
    generator: Generator,
    data: Dataset,
    heldout: Dataset | None = None,
    samples: int = 64,
    seed: int = 0,
    settings: Settings = Settings(),
    batch: int = 8,
    gallery: int = GALLERY,
) -> Evaluation:
    """Metrics over `samples` captions of each data set, the same samples for the same seed.

    gallery: images per set, at least `samples`, among which reconstructions are looked up and whose latents give the
    mean. Held-out images that are among them are skipped. With `settings.shape` images are those of that bucket, else
    squares. Data sets that require source images, both or none, are editing pairs. RunError if a set has too few
    samples, or stage 1 was not trained on pairs.
    """
    edits = measures_edits(generator, data, heldout)
    generator.require_shape(settings.shape)
    asked, sizes, only = generator.bucket(settings.shape), (generator.image_size, generator.flux_size), None
    if settings.shape and generator.rule:
        sizes, only = generator.rule, asked
    gallery = max(gallery, samples)
    sets, chosen = choose_sets(data, heldout, seed, sizes, samples, gallery, only)
    kinds = sum(len(_kinds(name, edits)) for name in chosen)
    shown_here = generator.group.rank == 0
    with progress("generating", kinds * samples, "images", shown=shown_here) as shown:
        trials = {
            name: _Trial(generator, name, of, seed, settings, batch, shown.advance) for name, of in chosen.items()
        }
    own = [(name, sample.index) for name, of in chosen.items() for sample in of]
    nearest = {
        prefix: NearestPixels(torch.cat([stack(trial.made[kind]) for trial in trials.values()]), own)
        for prefix, kind in RECONSTRUCTIONS.items()
    }
    total, count = torch.zeros((), dtype=torch.float64), 0
    with progress("looking up reconstructions among all images", shown=shown_here):
        for one in sets:
            for part in one.gallery(gallery, 4 * batch, [sample.index for sample in chosen[one.name]]):
                keys, originals = [(one.name, sample.index) for sample in part], stack([s.original for s in part])
                for lookup in nearest.values():
                    lookup.add(keys, originals)
                if one.name == "train":
                    total = total + generator.encode(stack([s.seen for s in part])).double().sum(0).cpu()
                    count += len(part)
    found: dict[str, dict[str, float]] = {name: {} for name in trials}
    for prefix, lookup in nearest.items():
        for name, hits in zip(trials, lookup.hits().double().split(samples), strict=True):
            found[name][f"{prefix}r1"] = float(hits.mean())
    figures = {
        name: {
            "latents": trial.latents(total / count),
            "reconstruction": {**trial.reconstruction(), **found[name]},
            **trial.matches(),
            **trial.editing(),
        }
        for name, trial in trials.items()
    }
    seeds = {name: trial.seeds for name, trial in trials.items()}
    return Evaluation(figures, chosen, seeds, nearest[""].seen, _sheet(trials), edits)


def _kinds(name: str, edits: bool) -> list[str]:
    """The kinds of images that are generated per caption of a data set."""
    found = ["full", "ground_truth", "latents_alone", "no_controlnet"]
    if edits or name == "train":
        found.append("empty_prompt")
    if edits:
        found.append("other_source")
    return found + (["other_latents", "random_latents"] if name == "train" else [])


class _Trial:
    """Images for the captions, or edits, of one data set, and their metrics, computed in fp32 or fp64."""

    def __init__(
        self,
        generator: Generator,
        name: str,
        samples: Sequence[Sample],
        seed: int,
        settings: Settings,
        batch: int,
        made: Callable[[int], None],
    ) -> None:
        self.generator, self.name, self.batch, self.seed = generator, name, batch, seed
        self.settings = settings
        self.indices = np.array([sample.index for sample in samples], dtype=np.int64)
        self.captions = [sample.caption for sample in samples]
        self.seeds = [seed + sample.index for sample in samples]
        self.originals = stack([sample.original for sample in samples])
        self.own = self._encode([Image.fromarray(sample.seen) for sample in samples])
        self.sources = shown_sources(samples)
        self.source_images = [Image.fromarray(sample.source[1]) for sample in samples if sample.source]
        self.others = None if self.sources is None else [*self.sources[1:], self.sources[0]]
        """Another pair's source image for each one."""
        decode = partial(generator.decoded, self.captions, self.seeds, settings, batch)
        decoded = decode(sources=self.sources)
        alone = replace(settings, empty_prompt=True)
        plans: dict[str, tuple[Settings, Tensor | None]] = {
            "full": (settings, decoded),
            "ground_truth": (settings, self.own),
            "latents_alone": (alone, self.own),
            "no_controlnet": (replace(settings, controlnet=False), None),
            "empty_prompt": (alone, decoded),
            "other_source": (alone, None if self.others is None else decode(sources=self.others)),
            "other_latents": (settings, self.own.roll(-1, 0)),
            "random_latents": (settings, self._random_latents()),
        }
        self.made: dict[str, list[Image.Image]] = {}
        for kind in _kinds(name, self.sources is not None):
            how, latents = plans[kind]
            self.made[kind] = generator.generate(self.captions, self.seeds, how, latents, batch, made)

    def latents(self, mean: Tensor) -> dict[str, dict[str, float]]:
        """Mean squared error and cosine of the branch's predictions on masked patches, by mask rate.

        mean [N, D]: a baseline that predicts the mean of each position; its error is `mean_mse`. Of editing pairs also
        the errors with another pair's source image, and of the source's latents as they are.
        """
        sums: dict[float, dict[str, float]] = {rate: defaultdict(float) for rate in MASK_RATES}
        for part in _parts(len(self.captions), self.batch):
            own = self.own[part]
            baselines = {"mean_mse": mean.to(own).expand_as(own)}
            if self.sources is not None:
                baselines["source_mse"] = self.generator.encode(torch.stack(self.sources[part]))
            for rate, mask, predicted in self._predictions(part, self.sources):
                wanted = own[mask].float()
                sums[rate]["cosine"] += float(F.cosine_similarity(predicted, wanted).double().sum())
                sums[rate]["patches"] += len(wanted)
                for name, found in {"mse": predicted, **{n: each[mask] for n, each in baselines.items()}}.items():
                    sums[rate][name] += _squares(found, wanted)
            for rate, mask, predicted in self._predictions(part, self.others) if self.others is not None else ():
                sums[rate]["other_source_mse"] += _squares(predicted, own[mask])
        return {
            str(rate): {name: total / found["patches"] for name, total in found.items() if name != "patches"}
            for rate, found in sums.items()
        }

    def _predictions(self, part: slice, sources: Sequence[Tensor] | None) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Mask rate, mask [B, N], and the predictions of the masked patches, of the captions in `part` with their
        `sources`."""
        model, grid = self.generator.mllm, self.generator.grid(self.settings)
        own, index, captions, patches = self.own[part], self.indices[part], self.captions[part], math.prod(grid)
        shown = [None] * len(captions) if sources is None else sources[part]
        prefix = prompt_prefix(model, self.generator.template, captions, shown, patches)
        noise = draw_latent_noise(model.head, self.seeds[part], patches)
        noise = None if noise is None else noise.flatten(0, 1)
        for rate in MASK_RATES:
            counts = np.full_like(index, math.ceil(rate * patches - 1e-9))  # as `hidden_counts` rounds
            drawn = draw_masks(self.seed, np.full_like(index, NO_EPOCH), index, counts, patches)
            mask = torch.from_numpy(drawn).to(own.device)
            hidden = model.branch(own, mask, prefix, grid=grid)
            yield rate, mask, predict(model.head, hidden.flatten(0, 1)[None], noise).view_as(hidden)[mask].float()

    def reconstruction(self) -> dict[str, float]:
        """`fidelity` of images from the true latents with and without the text, and from the text only."""
        kinds = {**RECONSTRUCTIONS, "no_controlnet_": "no_controlnet"}
        made = {prefix: self.made[kind] for prefix, kind in kinds.items()}
        return fidelity(self.generator, made, self.originals, self.batch)

    def editing(self) -> dict[str, dict[str, float]]:
        """PSNR and SSIM of edits, and of the source images, against the targets; nothing of other samples."""
        if self.sources is None:
            return {}
        images = {**self.made, "source": self.source_images}
        made = {prefix: images[kind] for prefix, kind in EDITED.items()}
        return {"editing": similarity(made, self.originals, self.batch)}

    def matches(self) -> dict[str, dict[str, Any]]:
        """How often a generated image is nearest to its caption's real image, and the distance between both sets.

        Real images are encoded at P pixels like generated ones: else a difference in sharpness would count.
        """
        real = self._encode(to_images(self.originals)).float()
        places = torch.arange(len(real), device=real.device)
        match: dict[str, dict[str, float]] = {}
        apart: dict[str, float] = {}
        shown = {**self.made, **({"source": self.source_images} if self.source_images else {})}
        for kind, images in shown.items():
            seen = self._encode(images).float()
            # Not Euclidean: the branch predicts a mean, which is shorter, and short vectors are all near the centre.
            alike = centred_cosine(seen.flatten(1), real.flatten(1))
            match[kind] = {"r1": recall(alike, places, 1), "r5": recall(alike, places, 5)}
            if kind == "other_latents":
                other = places.roll(-1)
                match[kind] |= {"other_r1": recall(alike, other, 1), "other_r5": recall(alike, other, 5)}
            apart[kind] = frechet(seen.mean(1), real.mean(1))
        match["chance"] = {"r1": 1 / len(real), "r5": min(1.0, 5 / len(real))}
        return {"match": match, "frechet": apart}

    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Patch latents [B, N, D] of images of the evaluation's shape in any size."""
        height, width = self.generator.pixels(self.settings)
        resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        return torch.cat([self.generator.encode(stack(resized[p])) for p in _parts(len(images), self.batch)])

    def _random_latents(self) -> Tensor:
        """Gaussian latents [B, N, D] with the mean and deviation of the true latents in every channel."""
        lanes = self.own[0].numel()
        draws = uniform(self.seed, Stream.POSTERIOR, np.full_like(self.indices, NO_EPOCH), self.indices, lanes)
        noise = gaussian(torch.from_numpy(draws)).view(self.own.shape).to(self.own)
        return self.own.mean((0, 1)) + self.own.std((0, 1)) * noise


def _squares(found: Tensor, wanted: Tensor) -> float:
    """Sum over patches [n, D] of the mean squared difference of their channels."""
    return float((found.float() - wanted.float()).square().mean(1).double().sum())


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _sheet(trials: dict[str, _Trial]) -> Image.Image:
    """Images of the first captions: training, then held-out ones."""
    rows: dict[str, list[Image.Image]] = {}
    columns: list[str] = []
    for trial in trials.values():
        shown = {
            **({"source image": trial.source_images} if trial.source_images else {}),
            "generated": trial.made["full"],
            **({"empty prompt": trial.made["empty_prompt"]} if trial.source_images else {}),
            "true latents": trial.made["ground_truth"],
            "true latents alone": trial.made["latents_alone"],
            "no ControlNet": trial.made["no_controlnet"],
            "original": to_images(trial.originals),
        }
        for label, images in shown.items():
            rows.setdefault(label, []).extend(images[:SHEET_COLUMNS])
        mark = "" if trial.name == "train" else "held out: "
        columns += [mark + caption for caption in trial.captions[:SHEET_COLUMNS]]
    return make_contact_sheet(rows, columns, across=SHEET_COLUMNS)
