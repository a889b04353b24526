"""A small run of stage 2 on a mixture of two sources in aspect-ratio buckets."""

from __future__ import annotations

from pathlib import Path

import runs
import shaped_shards
import small_model
import tiny_flux

RECIPE = "tiny-controlnet"


def arguments(folder: Path) -> list[str]:
    """Save shards, a FLUX and a backbone to `folder`, those that are missing, and return the arguments of the `bifrost`
    command that trains on them; one image is damaged, and one too small for a bucket."""
    for name, shards, first in (("a", 4, 0), ("b", 2, 200)):
        if not (folder / name).is_dir():
            shaped_shards.save(folder / name, shards, first)
    if not (folder / "flux").is_dir():
        tiny_flux.save(tiny_flux.pipeline(), folder / "flux")
    backbone, _ = small_model.settings(folder / "backbone")
    return runs.arguments(
        folder,
        folder,
        backbone,
        f"flux.path={folder}/flux",
        "data.shards=null",
        f"data.sources=[{{name: a, shards: {folder}/a, weight: 3}}, {{name: b, shards: {folder}/b, weight: 1}}]",
        "data.buckets={ratios: [1x1, 3x2, 2x3]}",
        "data.max_bad_fraction=1",
        "ema.decay=0.9",
        "global_batch=4",
        recipe=RECIPE,
    )
