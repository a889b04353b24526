"""`bifrost eval`: metrics of both stages as JSON, a table and a contact sheet."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.atomic import write_atomic
from ...data.progress import progress
from ...data.shards import open_dataset
from ...slurm.exit_record import newest_step
from ...slurm.io import write_json
from ..errors import RunError, writing
from ..io import write_png
from ..monitors.evaluations import note_evaluation
from ..versions import versions
from .generate import Reveal

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation

METRICS, TABLE, SHEET = "metrics.json", "table.txt", "contact_sheet.png"
VERSIONS = ("torch", "transformers", "diffusers", "numpy", "pillow")
LABELS = {
    "full": "both stages",
    "ground_truth": "true latents",
    "latents_alone": "true latents alone",
    "no_controlnet": "no ControlNet",
    "empty_prompt": "empty prompt",
    "other_latents": "another image's latents",
    "random_latents": "random latents",
}


def evaluate(
    mllm: Annotated[Path, typer.Option(help="A stage-1 run folder, or an export of one.")],
    controlnet: Annotated[Path, typer.Option(help="A stage-2 run folder, or a `flux_controlnet` folder.")],
    data: Annotated[str, typer.Option(help="Shards of the training images, braces and wildcards in quotes.")],
    out: Annotated[Path, typer.Option(help="A new folder, or one of an earlier evaluation, which is replaced.")],
    heldout: Annotated[str | None, typer.Option(help="Shards that neither stage was trained on.")] = None,
    samples: Annotated[int, typer.Option(help="Captions per data set, chosen by the seed.", min=2)] = 64,
    gallery: Annotated[
        int, typer.Option(help="Images per data set, at most, for retrieval of reconstructions.", min=1)
    ] = 4096,
    flux: Annotated[str | None, typer.Option(help="FLUX, where the ControlNet does not name it.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the captions, the masks and the images.", min=0, max=2**62)] = 0,
    steps: Annotated[int, typer.Option(help="Decoding steps, up to the number of patches.", min=1)] = 16,
    schedule: Annotated[Reveal, typer.Option(help="How many patches each step reveals.")] = Reveal.cosine,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance of the latents; 1 is none.")] = 1.0,
    flux_steps: Annotated[int, typer.Option(help="Euler steps of FLUX.", min=1)] = 28,
    flux_guidance: Annotated[float, typer.Option(help="FLUX guidance scale.")] = 3.5,
    flux_cfg: Annotated[float, typer.Option(help="Classifier-free guidance of FLUX's text; 1 is none.")] = 1.0,
    conditioning_scale: Annotated[float, typer.Option(help="Strength of the ControlNet.")] = 0.7,
    batch: Annotated[int, typer.Option(help="Images made together.", min=1)] = 8,
) -> None:
    """Measure both stages on shards: latents, reconstruction, prompt match with controls, Fréchet distance."""
    _check(out)
    train = open_dataset(data)
    other = open_dataset(heldout) if heldout else None

    from ..evaluation import evaluate as module
    from ..inference.flux_sampler import Sampling
    from ..inference.generator import Generator, Settings, origin
    from ..inference.masked_decoding import reveal_counts

    settings = Settings(
        steps, schedule.value, guidance, flux=Sampling(flux_steps, flux_guidance, conditioning_scale, flux_cfg)
    )
    made_with = {"mllm": origin(mllm), "controlnet": origin(controlnet)}
    with progress("loading the models"):
        generator = Generator.load(mllm, controlnet, flux)
    reveal_counts(generator.mllm.branch.side**2, steps, settings.schedule)  # raises for more steps than patches
    found = module.evaluate(generator, train, other, samples, seed, settings, batch, gallery)
    record: dict[str, Any] = {
        "figures": found.figures,
        "samples": samples,
        "chance": 1 / samples,
        "gallery": found.gallery,
        "seed": seed,
        "settings": asdict(settings),
        "batch": batch,
        **made_with,
        "flux": str(generator.flux.folder.path),
        "data": {
            name: {
                "shards": spec,
                "fingerprint": dataset.fingerprint,
                "keys": [sample.key for sample in found.samples[name]],
                "captions": [sample.caption for sample in found.samples[name]],
                "image_seeds": found.image_seeds[name],
            }
            for name, spec, dataset in (("train", data, train), ("heldout", heldout, other))
            if dataset is not None
        },
        "device": str(generator.device),
        "dtype": str(next(generator.mllm.parameters()).dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": versions(VERSIONS),
    }
    text = table(found)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_png(out / SHEET, found.contact_sheet)
        write_atomic(out / TABLE, text.encode())
        write_json(out / METRICS, record)
    for run in (mllm, controlnet):
        if problem := note_evaluation(run, newest_step(run), found.figures):
            print(problem, file=sys.stderr)
    print(text, end="")
    print(f"{out}: {METRICS}, {TABLE}, {SHEET}")


def table(found: Evaluation) -> str:
    """The metrics as a text table."""
    lines: list[str] = []
    for name, figures in found.figures.items():
        several = len(found.samples[name])
        lines += [f"{'training' if name == 'train' else 'held-out'} captions: {several}", ""]
        lines += [_row("hidden patches", "MSE", "cosine", "position mean's MSE")]
        for rate, row in figures["latents"].items():
            values = (f"{row[key]:.4f}" for key in ("mse", "cosine", "mean_mse"))
            lines += [_row(f"  {float(rate):.0%}", *values)]
        row = figures["reconstruction"]
        lines += ["", _row("reconstruction", "PSNR", "SSIM", f"R@1 of {found.gallery:,}")]
        kinds = {"true latents": "", "true latents alone": "latents_alone_", "VAE alone": "vae_"}
        for label, kind in {**kinds, "no ControlNet": "no_controlnet_"}.items():
            hits = f"{row[kind + 'r1']:.3f}" if kind + "r1" in row else ""
            lines += [_row(f"  {label}", f"{row[kind + 'psnr']:.2f} dB", f"{row[kind + 'ssim']:.4f}", hits)]
        lines += ["", _row(f"prompt match of {several}", "R@1", "R@5", "Fréchet distance")]
        for kind, label in LABELS.items():
            if (row := figures["match"].get(kind)) is None:
                continue
            lines += [_row(f"  {label}", f"{row['r1']:.3f}", f"{row['r5']:.3f}", f"{figures['frechet'][kind]:.4f}")]
            if "other_r1" in row:
                lines += [_row("    the other image", f"{row['other_r1']:.3f}", f"{row['other_r5']:.3f}", "")]
        row = figures["match"]["chance"]
        lines += [_row("  chance", f"{row['r1']:.3f}", f"{row['r5']:.3f}", ""), ""]
    return "\n".join(line.rstrip() for line in lines)


def _row(label: str, *values: str) -> str:
    return f"{label:<28}" + "".join(f"{value:>{width}}" for value, width in zip(values, (12, 12, 22), strict=True))


def _check(out: Path) -> None:
    """RunError unless `out` is new, empty, or contains only an evaluation."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is not a folder")
    others = sorted({path.name for path in out.iterdir()} - {METRICS, TABLE, SHEET}) if out.is_dir() else []
    if others:
        raise RunError(f"{out}: is not empty ({others[0]}) and was not made by `bifrost eval`; name a new folder")
