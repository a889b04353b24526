"""Scores of generated images that others report: FID, KID, Inception score, LPIPS, CLIP score.

Legend: B images of S x S pixels, N generated and M reference images, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ...data.progress import progress
from ..errors import RunError
from .extractors import Inception, Lpips
from .image_metrics import frechet
from .image_sets import ImageSet

SEED = 0
"""Of the subsets and splits, so that the same images have the same scores."""
SPLITS = 10
"""Parts of the images over which the Inception score is averaged."""
KID_SUBSETS, KID_SUBSET = 100, 1000
"""Number of subsets, and images in each, of Binkowski et al. 2018."""


@dataclass(frozen=True)
class Scored:
    """Images to score.

    size: side S of all images. scaled: whether they are scaled to it, or must have it. batch: images at a time.
    """

    generated: ImageSet
    reference: ImageSet | None = None
    size: int = 0
    scaled: bool = False
    batch: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def vectors(self, images: ImageSet, extract: Callable[[Tensor], Tensor], what: str) -> Tensor:
        """What `extract` returns for every image, one after another."""
        found = []
        with progress(f"{what} of {images.place}", len(images.names), "images") as shown:
            for batch in images.batches(self.size, self.scaled, self.batch):
                found.append(extract(batch))
                shown.advance(len(batch))
        return torch.cat(found)


def inception_scores(scored: Scored, path: Path) -> dict[str, float]:
    """`is` and `is_std` of the generated images by the extractor in `path`; with a reference also `fid`, `kid` and
    `kid_std`. RunError if a set has fewer than `SPLITS` images."""
    for images in filter(None, (scored.generated, scored.reference)):
        if len(images.names) < SPLITS:
            raise RunError(f"{images.place}: {len(images.names)} images, at least {SPLITS} are needed for --inception")
    extractor = Inception(path, scored.device)
    found = inception_score(scored.vectors(scored.generated, extractor.probabilities, "class probabilities"))
    if scored.reference is not None:
        made = scored.vectors(scored.generated, extractor.features, "features")
        real = scored.vectors(scored.reference, extractor.features, "features")
        found |= {"fid": frechet(real, made), **kernel_distance(real, made)}
    return found


def inception_score(probabilities: Tensor) -> dict[str, float]:
    """exp of the mean KL divergence of class probabilities [N, C] from their mean (Salimans et al. 2016): mean and
    standard deviation over `SPLITS` parts in a random order."""
    with _reproducible():
        metric = InceptionScore(feature=torch.nn.Identity(), splits=SPLITS)
        # The metric takes logits. Probabilities that underflowed in fp32 would be -inf.
        metric.update(probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log())
        mean, std = metric.compute()
    return {"is": float(mean), "is_std": float(std)}


def kernel_distance(real: Tensor, made: Tensor) -> dict[str, float]:
    """KID of features [M, F] and [N, F] (Binkowski et al. 2018): mean and standard deviation over subsets.

    A set of fewer than `KID_SUBSET` images is used as a whole, together with as many of the other.
    """
    size = min(KID_SUBSET, len(real), len(made))
    whole = size == len(real) == len(made)
    with _reproducible():
        metric = KernelInceptionDistance(
            feature=torch.nn.Identity(), subsets=1 if whole else KID_SUBSETS, subset_size=size
        )
        metric.update(real.double(), real=True)
        metric.update(made.double(), real=False)
        mean, std = metric.compute()
    return {"kid": float(mean), "kid_std": float(std)}


def lpips_scores(scored: Scored, path: Path) -> dict[str, float]:
    """Mean `lpips` between each generated image and the reference image of the same name."""
    assert scored.reference is not None
    order = scored.reference.order_of(scored.generated.names)
    extractor = Lpips(path, scored.device)
    total = 0.0
    with progress("LPIPS", len(order), "images") as shown:
        made = scored.generated.batches(scored.size, scored.scaled, scored.batch)
        real = scored.reference.batches(scored.size, scored.scaled, scored.batch, order)
        for one, other in zip(made, real, strict=True):
            total += float(extractor.distances(one, other).sum())
            shown.advance(len(one))
    return {"lpips": total / len(order)}


def clip_scores(scored: Scored, folder: Path) -> dict[str, float]:
    """Mean `clip_score` of the generated images and the prompts that they were generated from."""
    from .clip_score import ClipScorer

    prompts = scored.generated.prompts
    if prompts is None:
        raise RunError(f"{scored.generated.place}: has no prompts.jsonl; --clip is for folders of `bifrost generate`")
    scorer, done = ClipScorer(folder, scored.device), 0

    def score(images: Tensor) -> Tensor:
        nonlocal done
        done += len(images)
        return scorer.scores(images, prompts[done - len(images) : done])

    return {"clip_score": float(scored.vectors(scored.generated, score, "CLIP score").mean())}


@contextmanager
def _reproducible() -> Iterator[None]:
    """The same random subsets every time, and without torchmetrics' notice that all features are kept in memory."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        yield
