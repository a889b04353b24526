"""How well stage 2 reconstructs images from their own patch latents, whatever stage 1 predicts.

Legend: B images, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data import Dataset
from ...data.bucket_rule import Bucket
from ...data.progress import progress
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator, to_images
from ..inference.settings import Settings
from .image_metrics import psnr, ssim
from .samples import GALLERY, Sample, choose_sets, stack

KINDS = 3
"""Images generated per caption."""
SHEET_COLUMNS = 8
"""Columns of the contact sheet per data set."""
ROWS = {
    "": "true latents",
    "latents_alone_": "true latents alone",
    "no_controlnet_": "no ControlNet",
    "original": "original",
}
"""Images, by the prefix of their metrics -> label of their row in the contact sheet."""


@dataclass
class ReconstructionEvaluation:
    """Results of an evaluation of stage 2 alone."""

    figures: dict[str, dict[str, dict[str, float]]]
    """For `train` and optionally `heldout`: `reconstruction`; see docs/evaluation.md."""
    samples: dict[str, list[Sample]]
    image_seeds: dict[str, list[int]]
    contact_sheet: Image.Image

    def record(self) -> dict[str, Any]:
        """The metrics, for metrics.json."""
        return {"figures": self.figures}


@torch.no_grad()
def evaluate_reconstruction(
    generator: Generator,
    data: Dataset,
    heldout: Dataset | None = None,
    samples: int = 64,
    seed: int = 0,
    settings: Settings = Settings(),
    batch: int = 8,
) -> ReconstructionEvaluation:
    """PSNR and SSIM of `samples` reconstructions of each data set, of the same images for the same seed; of the images
    that `evaluate` chooses.

    generator: needs no branch. Of a ControlNet that was trained in buckets, every image is in the shape of its bucket,
    or, with `settings.shape`, only images of that one are used.
    RunError if a set has too few samples.
    """
    sizes = generator.rule or (generator.image_size, generator.flux_size)
    asked = generator.bucket(settings.shape)
    only = asked if settings.shape and generator.rule else None
    _, chosen = choose_sets(data, heldout, seed, sizes, samples, max(GALLERY, samples), only)
    seeds = {name: [seed + sample.index for sample in of] for name, of in chosen.items()}
    rows: dict[str, list[Image.Image]] = {}
    columns: list[str] = []
    figures = {}
    with progress("generating", KINDS * samples * len(chosen), "images", shown=generator.group.rank == 0) as shown:
        for name, of in chosen.items():
            made: dict[str, dict[int, Image.Image]] = {}
            measured: list[tuple[int, dict[str, float]]] = []
            for places in _alike(of):
                part, own = [of[place] for place in places], [seeds[name][place] for place in places]
                images = _reconstructed(generator, part, own, settings, batch, shown.advance)
                originals = stack([sample.original for sample in part])
                measured.append((len(part), fidelity(generator, images, originals, batch)))
                for prefix, each in {**images, "original": to_images(originals)}.items():
                    made.setdefault(prefix, {}).update(zip(places, each, strict=True))
            figures[name] = {"reconstruction": _weighted(measured)}
            for prefix, label in ROWS.items():
                rows.setdefault(label, []).extend(made[prefix][place] for place in range(len(of[:SHEET_COLUMNS])))
            mark = "" if name == "train" else "held out: "
            columns += [mark + sample.caption for sample in of[:SHEET_COLUMNS]]
    sheet = make_contact_sheet(rows, columns, across=SHEET_COLUMNS)
    return ReconstructionEvaluation(figures, chosen, seeds, sheet)


def _alike(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the samples in each bucket; of all without buckets."""
    found: dict[Bucket | None, list[int]] = {}
    for place, sample in enumerate(samples):
        found.setdefault(sample.bucket, []).append(place)
    return list(found.values())


def _weighted(measured: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean over all images of means over some of them, with the number of these."""
    if len(measured) == 1:
        return measured[0][1]
    total = sum(count for count, _ in measured)
    return {name: sum(count * each[name] for count, each in measured) / total for name in measured[0][1]}


def _reconstructed(
    generator: Generator,
    samples: Sequence[Sample],
    seeds: Sequence[int],
    settings: Settings,
    batch: int,
    made: Callable[[int], None],
) -> dict[str, list[Image.Image]]:
    """Prefix of the metrics -> images: from the true latents with the caption, from the latents alone, and from the
    caption alone."""
    captions = [sample.caption for sample in samples]
    seen = stack([sample.seen for sample in samples])
    own = torch.cat([generator.encode(part) for part in seen.split(batch)])
    bucket = samples[0].bucket
    settings = replace(settings, shape=str(bucket) if bucket else None)
    plans = {
        "": (settings, own),
        "latents_alone_": (replace(settings, empty_prompt=True), own),
        "no_controlnet_": (replace(settings, controlnet=False), None),
    }
    return {
        prefix: generator.generate(captions, seeds, how, latents, batch, made)
        for prefix, (how, latents) in plans.items()
    }


def fidelity(
    generator: Generator, made: Mapping[str, Sequence[Image.Image]], originals: Tensor, batch: int
) -> dict[str, float]:
    """PSNR in dB and SSIM against `originals`, uint8 [B, 3, P, P], means over the images: of each list of `made`, by
    the prefix of its metrics, and, as `vae_`, of the originals through FLUX's VAE alone."""
    flux, device = generator.flux, generator.device
    through = [flux.decode_latents(flux.encode_images(part.to(device))).cpu() for part in originals.split(batch)]
    return similarity({**made, "vae_": to_images(torch.cat(through))}, originals, batch)


def similarity(made: Mapping[str, Sequence[Image.Image]], originals: Tensor, batch: int) -> dict[str, float]:
    """PSNR in dB and SSIM of each list of `made`, by the prefix of its metrics, against `originals`; see `fidelity`."""
    found: dict[str, float] = {}
    for prefix, each in made.items():
        images = stack(each)
        for name, measure in (("psnr", psnr), ("ssim", ssim)):
            pairs = zip(images.split(batch), originals.split(batch), strict=True)
            found[prefix + name] = float(torch.cat([measure(*pair) for pair in pairs]).mean())
    return found
