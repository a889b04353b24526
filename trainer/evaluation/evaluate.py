"""Evaluation of both stages on a data set: latents, reconstructions, and whether images match their prompts.

Legend: B samples, N patch latents of width D, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...data import Dataset
from ...data.progress import progress
from ...kernels import PrefixLayout
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator, to_images
from ..inference.masked_decoding import NO_EPOCH, draw_latent_noise, predict
from ..inference.settings import Settings
from ..models.draws import gaussian
from ..models.masking import draw_masks
from ..models.rng import Stream, uniform
from .image_metrics import NearestPixels, centred_cosine, frechet, recall
from .reconstruction import SHEET_COLUMNS, fidelity
from .samples import GALLERY, Sample, choose_sets, stack

MASK_RATES = (0.7, 0.8, 0.9, 1.0)
RECONSTRUCTIONS = {"": "ground_truth", "latents_alone_": "latents_alone"}
"""Prefix of the metrics -> images from the true latents, with the caption and with the empty prompt."""


@dataclass
class Evaluation:
    """Results of an evaluation."""

    figures: dict[str, dict[str, Any]]
    """For `train` and optionally `heldout`: `latents`, `reconstruction`, `match`, `frechet`; see docs/evaluation.md."""
    samples: dict[str, list[Sample]]
    image_seeds: dict[str, list[int]]
    gallery: int
    """Number of images among which reconstructions were looked up."""
    contact_sheet: Image.Image

    def record(self) -> dict[str, Any]:
        """The metrics, for metrics.json."""
        return {"figures": self.figures, "chance": 1 / len(self.samples["train"]), "gallery": self.gallery}


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
    squares. RunError if a set has too few samples.
    """
    asked, sizes, only = generator.bucket(settings.shape), (generator.image_size, generator.flux_size), None
    if settings.shape and generator.rule:
        sizes, only = generator.rule, asked
    gallery = max(gallery, samples)
    sets, chosen = choose_sets(data, heldout, seed, sizes, samples, gallery, only)
    kinds = sum(_Trial.KINDS[name] for name in chosen)
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
        }
        for name, trial in trials.items()
    }
    seeds = {name: trial.seeds for name, trial in trials.items()}
    return Evaluation(figures, chosen, seeds, nearest[""].seen, _sheet(trials))


class _Trial:
    """Images for the captions of one data set, and their metrics, computed in fp32 or fp64."""

    KINDS: ClassVar = {"train": 7, "heldout": 4}
    """Images per caption."""

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
        decoded = generator.decoded(self.captions, self.seeds, settings, batch)
        plans: dict[str, tuple[Settings, Tensor | None]] = {
            "full": (settings, decoded),
            "ground_truth": (settings, self.own),
            "latents_alone": (replace(settings, empty_prompt=True), self.own),
            "no_controlnet": (replace(settings, controlnet=False), None),
        }
        if name == "train":
            plans["empty_prompt"] = replace(settings, empty_prompt=True), decoded
            plans["other_latents"] = settings, self.own.roll(-1, 0)
            plans["random_latents"] = settings, self._random_latents()
        self.made: dict[str, list[Image.Image]] = {}
        for kind, (how, latents) in plans.items():
            self.made[kind] = generator.generate(self.captions, self.seeds, how, latents, batch, made)
        assert len(plans) == self.KINDS[name]

    def latents(self, mean: Tensor) -> dict[str, dict[str, float]]:
        """Mean squared error and cosine of the branch's predictions on masked patches, by mask rate.

        mean [N, D]: a baseline that predicts the mean of each position; its error is `mean_mse`.
        """
        model, grid = self.generator.mllm, self.generator.grid(self.settings)
        patches = math.prod(grid)
        mean = mean.to(self.own)
        sums = torch.zeros(len(MASK_RATES), 4, dtype=torch.float64)
        for part in _parts(len(self.captions), self.batch):
            own, index = self.own[part], self.indices[part]
            input_ids, lengths = self.generator.template.batch(self.captions[part])
            layout = PrefixLayout.of(lengths, patches, own.device)
            prefix = model.backbone.prefix(input_ids.to(own.device), layout)
            noise = draw_latent_noise(model.head, self.seeds[part], patches)
            noise = None if noise is None else noise.flatten(0, 1)
            for row, rate in enumerate(MASK_RATES):
                counts = np.full_like(index, math.ceil(rate * patches - 1e-9))  # as `hidden_counts` rounds
                drawn = draw_masks(self.seed, np.full_like(index, NO_EPOCH), index, counts, patches)
                mask = torch.from_numpy(drawn).to(own.device)
                hidden = model.branch(own, mask, prefix, grid=grid)
                found = predict(model.head, hidden.flatten(0, 1)[None], noise).view_as(hidden)
                found, wanted, average = found[mask].float(), own[mask].float(), mean.expand_as(own)[mask].float()
                sums[row] += torch.tensor(
                    [
                        float((found - wanted).square().mean(1).double().sum()),
                        float(F.cosine_similarity(found, wanted).double().sum()),
                        float((average - wanted).square().mean(1).double().sum()),
                        len(wanted),
                    ]
                )
        rows = (sums[:, :3] / sums[:, 3:]).tolist()
        names = "mse", "cosine", "mean_mse"
        return {str(rate): dict(zip(names, row, strict=True)) for rate, row in zip(MASK_RATES, rows, strict=True)}

    def reconstruction(self) -> dict[str, float]:
        """`fidelity` of images from the true latents with and without the text, and from the text only."""
        kinds = {**RECONSTRUCTIONS, "no_controlnet_": "no_controlnet"}
        made = {prefix: self.made[kind] for prefix, kind in kinds.items()}
        return fidelity(self.generator, made, self.originals, self.batch)

    def matches(self) -> dict[str, dict[str, Any]]:
        """How often a generated image is nearest to its caption's real image, and the distance between both sets.

        Real images are encoded at P pixels like generated ones: else a difference in sharpness would count.
        """
        real = self._encode(to_images(self.originals)).float()
        places = torch.arange(len(real), device=real.device)
        match: dict[str, dict[str, float]] = {}
        apart: dict[str, float] = {}
        for kind, images in self.made.items():
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


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _sheet(trials: dict[str, _Trial]) -> Image.Image:
    """Images of the first captions: training, then held-out ones."""
    rows: dict[str, list[Image.Image]] = {}
    columns: list[str] = []
    for trial in trials.values():
        shown = {
            "generated": trial.made["full"],
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
