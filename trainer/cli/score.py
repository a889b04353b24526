"""`bifrost score`: scores that others report, of a folder of generated images."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...slurm.exit_record import newest_step
from ...slurm.io import write_json
from ..checkpoint.durable import sha256
from ..errors import RunError, writing
from ..io import flat, read_json
from ..monitors.evaluations import note_evaluation
from ..versions import versions

if TYPE_CHECKING:
    from ..evaluation.image_scores import Scored

METRICS = "metrics.json"
VERSIONS = ("torch", "torchmetrics", "transformers", "numpy", "pillow")

Figures = dict[str, dict[str, Any]]
"""Group of scores -> its figures, or the settings that they were computed with."""


def score(
    generated: Annotated[Path, typer.Argument(help="A folder of images, such as one of `bifrost generate`.")],
    reference: Annotated[str | None, typer.Option(help="Real images: a folder, or shards in quotes.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="inception-2015-12-05.pt: Inception score, and with --reference FID and KID.")
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="vgg16.pt: LPIPS between images of the same name.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP: CLIP score of images and prompts.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side to which all images are scaled; default: all have the same.", min=1)
    ] = None,
    geneval: Annotated[Path | None, typer.Option(help="results.jsonl of GenEval's scorer, of these images.")] = None,
    dpg: Annotated[Path | None, typer.Option(help="Results of DPG-Bench's scorer, of these images.")] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Run that made them, to which the scores are added; may be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 32,
) -> None:
    """Score a folder of images: FID, KID, Inception score, LPIPS, CLIP score, and what GenEval and DPG-Bench found."""
    if not any((inception, lpips, clip, geneval, dpg)):
        raise RunError("nothing to score: give --inception, --lpips, --clip, --geneval or --dpg")
    if lpips and not reference:
        raise RunError("--lpips compares with --reference: give the real images")
    if reference and not inception and not lpips:
        raise RunError("--reference is for --inception and --lpips: give one of them, or leave it out")
    if missing := next((each for each in run or [] if not (each / "metrics.jsonl").is_file()), None):
        raise RunError(f"{missing}: not a run folder (no metrics.jsonl); give the one that made the images")
    from ..inference.outputs import read_record

    record = read_record(generated)
    figures, settings = _results(generated, record, geneval, dpg)
    if inception or lpips or clip:
        scored = _open(generated, reference, size, batch)
        for name, found in _measure(scored, {"inception": inception, "lpips": lpips, "clip": clip}).items():
            figures[name], settings[name] = found
    _write(generated, figures, settings)
    for each in run or []:
        if problem := note_evaluation(each, _step(each, record), figures):
            print(problem, file=sys.stderr)


def _results(
    folder: Path, record: Sequence[dict[str, Any]], geneval: Path | None, dpg: Path | None
) -> tuple[Figures, Figures]:
    """What the benchmarks' own scorers found. RunError if it is not of all images of `record`, unless that is empty."""
    from ..evaluation.benchmark_results import read_dpg, read_geneval

    figures: Figures = {}
    settings: Figures = {}
    for name, path, read, count in (("geneval", geneval, read_geneval, "images"), ("dpg", dpg, read_dpg, "prompts")):
        if path is None:
            continue
        found = read(path)
        if record and found[count] != len(record):
            raise RunError(f"{path}: has {found[count]} results, {folder} {len(record)} images; score them again")
        figures[name], settings[name] = found, {"results": str(path.resolve())}
    return figures, settings


def _open(generated: Path, reference: str | None, size: int | None, batch: int) -> Scored:
    import torch

    from ..evaluation.image_scores import Scored
    from ..evaluation.image_sets import open_folder, open_images

    made = open_folder(generated)
    real = open_images(reference) if reference else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = size or len(made.square(0, None))
    return Scored(made, real, side, size is not None, batch, device)


def _measure(scored: Scored, weights: dict[str, Path | None]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Figures and settings of each group with weights."""
    from ..evaluation.image_scores import clip_scores, inception_scores, lpips_scores

    measures = {"inception": inception_scores, "lpips": lpips_scores, "clip": clip_scores}
    reference = scored.reference
    common = {
        "images": len(scored.generated.names),
        "size": scored.size,
        "device": scored.device.type,
        "versions": versions(VERSIONS),
    }
    of_reference = {"reference": reference.place, "reference_images": len(reference.names)} if reference else {}
    found = {}
    for name, path in weights.items():
        if path is not None:
            against = {} if name == "clip" else of_reference
            figures = measures[name](scored, path)
            found[name] = figures, {"weights": str(path.resolve()), **_sha256(path), **against, **common}
    return found


def _sha256(path: Path) -> dict[str, str]:
    """The hash of a weight file; nothing for a folder."""
    return {"sha256": sha256(path)} if path.is_file() else {}


def _write(folder: Path, figures: Figures, settings: Figures) -> None:
    """Add the figures to the folder's metrics.json, in which those of other groups remain, and print them."""
    old = read_json(folder / METRICS) or {}
    with writing(folder):
        write_json(
            folder / METRICS,
            {
                "figures": {**old.get("figures", {}), **figures},
                "settings": {**old.get("settings", {}), **settings},
            },
        )
    for key, value in flat(figures):
        print(f"{key:<32} {value:.5g}" if isinstance(value, float) else f"{key:<32} {value}")
    print(folder / METRICS)


def _step(run: Path, record: Sequence[dict[str, Any]]) -> int:
    """The step of `run` from which the images of `record` were made; if it does not name the run, the newest."""
    for made_with in (str(line.get(stage)) for line in record[:1] for stage in ("mllm", "controlnet")):
        if match := re.fullmatch(rf"{re.escape(str(run.resolve()))} step (\d+)", made_with):
            return int(match[1])
    return newest_step(run)
