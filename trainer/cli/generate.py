"""`bifrost generate`: prompts to a folder of images, over any number of ranks, restartable.

Every rank writes the same record, generates its own share of the images, and skips existing ones; no rank waits for
another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ...data.progress import progress
from ...data.units import counted
from ..errors import RunError
from ..inference.outputs import (
    ImageFile,
    Layout,
    Prompt,
    begin,
    check,
    clean,
    plan,
    read_prompts,
    record,
    write,
    write_contact_sheet,
)
from .on_ranks import is_rank
from .options import RanksOption

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.generator import Generator
    from ..inference.settings import Settings


class Reveal(str, Enum):
    cosine = "cosine"
    linear = "linear"


def generate(
    context: typer.Context,
    mllm: Annotated[Path, typer.Option(help="A stage-1 run folder, a checkpoint in one, or an export.")],
    controlnet: Annotated[
        Path, typer.Option(help="A stage-2 run folder, a checkpoint in one, or a `flux_controlnet` folder.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder, or one from the same command.")],
    text: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; all have the same seed.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="More prompts: one per line, JSON lines with prompt (and id), or a folder of ID.txt."),
    ] = None,
    flux: Annotated[str | None, typer.Option(help="FLUX, where the ControlNet does not name it.")] = None,
    layout: Annotated[
        Layout, typer.Option(help="plain; geneval and dpg: four samples per prompt, in those benchmarks' layouts.")
    ] = Layout.plain,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; prompts of a file count up from it.", min=0, max=2**62)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Decoding steps, up to the number of patches.", min=1)] = 16,
    schedule: Annotated[Reveal, typer.Option(help="How many patches each step reveals.")] = Reveal.cosine,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance of the latents; 1 is none.")] = 1.0,
    temperature: Annotated[
        float, typer.Option(help="Deviation of the noise from which a flow head samples latents.", min=0)
    ] = 1.0,
    flux_steps: Annotated[int, typer.Option(help="Euler steps of FLUX.", min=1)] = 28,
    flux_guidance: Annotated[float, typer.Option(help="FLUX guidance scale.")] = 3.5,
    flux_cfg: Annotated[float, typer.Option(help="Classifier-free guidance of FLUX's text; 1 is none.")] = 1.0,
    conditioning_scale: Annotated[float, typer.Option(help="Strength of the ControlNet.")] = 0.7,
    latents_from: Annotated[Path | None, typer.Option(help="Generate from this image's own latents.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Edit this image: prompts are instructions, for a run on editing pairs.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT of the images, one that both stages were trained in.", show_default="a square"),
    ] = None,
    no_controlnet: Annotated[bool, typer.Option("--no-controlnet", help="Control: FLUX with its text only.")] = False,
    empty_prompt: Annotated[bool, typer.Option("--empty-prompt", help="Control: FLUX without its text.")] = False,
    batch: Annotated[int, typer.Option(help="Images made together.", min=1)] = 8,
    ranks: RanksOption = None,
) -> None:
    """Generate images from prompts with both stages: one file each, a contact sheet, and a record of the settings."""
    if latents_from is not None and no_controlnet:
        raise RunError("--latents-from goes through the ControlNet: leave out --no-controlnet")
    if source is not None and (latents_from is not None or no_controlnet):
        other = "--latents-from" if latents_from is not None else "--no-controlnet"
        raise RunError(f"--source is read to decode latents, and with {other} none are decoded: leave one out")
    if latents_from is not None and shape is not None:
        raise RunError("--latents-from gives the images the shape of its own: leave out --shape")
    asked = [Prompt(clean(prompt)) for prompt in text or []]
    listed = read_prompts(prompts) if prompts else []
    if latents_from is not None and not asked + listed:
        asked = [Prompt("", re.sub(r"[^\w-]+", "-", latents_from.stem))]
    files = plan(asked, listed, seed, layout)

    is_rank(context, ranks)
    from ..inference.generator import origin
    from ..inference.settings import Sampling, Settings

    sampling = Sampling(flux_steps, flux_guidance, conditioning_scale, flux_cfg)
    settings = Settings(steps, schedule.value, guidance, not no_controlnet, empty_prompt, sampling, temperature, shape)
    made_with = {
        "mllm": origin(mllm),
        "controlnet": origin(controlnet),
        "flux": flux,
        "latents_from": str(latents_from.resolve()) if latents_from else None,
        **({"source": str(source.resolve())} if source else {}),
        "settings": {name: value for name, value in asdict(settings).items() if name != "shape" or value},
    }
    given = _Given(*(_read(path) if path else None for path in (latents_from, source)))
    _make(out, files, record(files, made_with), (mllm, controlnet, flux), settings, given, batch, layout)


class _Given(NamedTuple):
    """Image files that all prompts share."""

    latents_from: bytes | None
    source: bytes | None


def _make(
    out: Path,
    files: Sequence[ImageFile],
    entries: bytes,
    models: tuple[Path, Path, str | None],
    settings: Settings,
    given: _Given,
    batch: int,
    layout: Layout,
) -> None:
    """Generate this rank's share of `files` that are not in `out` yet."""
    import torch

    from ..inference.generator import Generator

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check(out, entries)
    share = files[rank::size]
    missing = [each for each in share if not (out / each.file).exists()]
    if missing:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        with progress("loading the models", shown=rank == 0):
            generator = Generator.load(*models, device)
        if given.latents_from is None:
            generator.check(settings, given.source is not None)  # before the folder is created
        else:
            settings = replace(settings, shape=generator.shape_of(given.latents_from))
        begin(out, entries)
        decoded = given.latents_from is None
        texts = [each.prompt.text for each in missing]
        generator.warn_about_truncation(texts, settings, decoded, given.source is not None)
        made, there = _made(generator, missing, settings, given, batch), len(share) - len(missing)
        with progress("generating", len(share), "images", there, shown=rank == 0) as shown:
            for file, images in made:
                write(out, file, images, layout)
                shown.advance()
    if all((out / each.file).exists() for each in files):
        write_contact_sheet(out, files)
    whose = f"rank {rank} of {size}: " if size > 1 else ""
    print(f"{out}: {whose}{counted(len(missing), 'image')} generated, {len(share) - len(missing)} already there")


def _made(
    generator: Generator, files: Sequence[ImageFile], settings: Settings, given: _Given, batch: int
) -> Iterator[tuple[ImageFile, list[Image.Image]]]:
    """Every file with its images, from its prompt, with the source image if there is one, or from given latents."""
    image = given.latents_from
    latents = generator.encode_file(image, settings) if image is not None else None
    source = generator.source_image(given.source, settings) if given.source is not None else None
    several = max(1, batch // len(files[0].seeds))
    for start in range(0, len(files), several):
        part = files[start : start + several]
        texts = [each.prompt.text for each in part for _ in each.seeds]
        seeds = [seed for each in part for seed in each.seeds]
        own = latents.expand(len(seeds), -1, -1) if latents is not None else None
        shown = [source] * len(seeds)
        images = iter(generator.generate(texts, seeds, settings, own, batch, sources=shown))
        for each in part:
            yield each, [next(images) for _ in each.seeds]


def _read(path: Path) -> bytes:
    from ...data.transforms import decode_image

    try:
        data = path.read_bytes()
        decode_image(data, 1)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    return data
