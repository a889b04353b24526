"""`bifrost eval`: metrics of both stages as JSON, a table and a contact sheet."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.atomic import write_atomic
from ...data.progress import progress
from ...slurm.io import write_json
from ..errors import RunError, writing
from ..io import write_png
from ..monitors.evaluations import note_evaluation
from ..versions import versions
from .generate import Reveal
from .on_ranks import is_rank
from .options import RanksOption

if TYPE_CHECKING:
    from ...data.scenes.grammar import Scene
    from ...data.shards import Dataset
    from ..evaluation.evaluate import Evaluation
    from ..evaluation.reconstruction import ReconstructionEvaluation
    from ..evaluation.scenes import SceneEvaluation
    from ..inference.latent_decoder import LatentDecoder
    from ..inference.settings import Settings

    DataSets = tuple[Dataset, Dataset | None]
    """Training images and held-out ones."""
    How = tuple[int, int, Settings, int]
    """Samples, seed, settings and images made together."""
    Measured = Evaluation | ReconstructionEvaluation | SceneEvaluation

METRICS, TABLE, SHEET = "metrics.json", "table.txt", "contact_sheet.png"
VERSIONS = ("torch", "transformers", "diffusers", "numpy", "pillow")


def evaluate(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Shards of the training images, braces and wildcards in quotes.")],
    out: Annotated[Path, typer.Option(help="A new folder, or one of an earlier evaluation, which is replaced.")],
    mllm: Annotated[
        Path | None,
        typer.Option(
            help="A stage-1 run folder, a checkpoint in one, or an export; without it, the reconstructions of stage 2"
            " alone are measured."
        ),
    ] = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(
            help="A stage-2 run folder, a checkpoint in one, or a `flux_controlnet` folder; without it, --scenes"
            " measures stage 1 alone."
        ),
    ] = None,
    heldout: Annotated[str | None, typer.Option(help="Shards that neither stage was trained on.")] = None,
    index_dir: Annotated[str | None, typer.Option(help="Folder or URL of the shards' indexes, if it is apart.")] = None,
    scenes: Annotated[
        Path | None, typer.Option(help="KEY.json of the shards if they are scenes: which objects do the images show?")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Captions per data set, or scenes per category, chosen by the seed.", min=2)
    ] = 64,
    gallery: Annotated[
        int | None,
        typer.Option(
            help="Images per data set, at most, for retrieval of reconstructions.", min=1, show_default="4096"
        ),
    ] = None,
    flux: Annotated[str | None, typer.Option(help="FLUX, where the ControlNet does not name it.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the captions, the masks and the images.", min=0, max=2**62)] = 0,
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
    shape: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT: only images of this aspect-ratio bucket.")] = None,
    batch: Annotated[int, typer.Option(help="Images made together.", min=1)] = 8,
    ranks: RanksOption = None,
) -> None:
    """Measure both stages on shards: latents, reconstruction, prompt match with controls, Fréchet distance.

    On scenes with their ground truth instead: the objects in the images, with controls, and answers of the MLLM. One
    stage alone: stage 1 on scenes, stage 2 by its reconstructions. On shards of editing pairs: edits of their sources.
    """
    _check(out)
    _check_stages(mllm, controlnet, flux, scenes, gallery, shape)
    ranked = is_rank(context, ranks)
    from ...data.scenes.key import read_key
    from ..evaluation.data_sets import open_sets

    sets = open_sets({"train": data, **({"heldout": heldout} if heldout else {})}, index_dir, mllm)
    truth = read_key(scenes) if scenes else None

    from ..inference.generator import origin
    from ..inference.settings import Sampling, Settings

    sampling = Sampling(flux_steps, flux_guidance, conditioning_scale, flux_cfg)
    settings = Settings(steps, schedule.value, guidance, flux=sampling, temperature=temperature, shape=shape)
    runs = {name: run for name, run in (("mllm", mllm), ("controlnet", controlnet)) if run is not None}
    made_with = {name: origin(run) for name, run in runs.items()}
    decoder = _load(mllm, controlnet, flux, ranked)
    data_sets = sets["train"][1], sets["heldout"][1] if heldout else None
    found = _measure(decoder, data_sets, (samples, seed, settings, batch), truth, gallery, mllm)
    if decoder.group.rank > 0:
        return
    data_used = {name: _data(found, name, *named) for name, named in sets.items()}
    asked = {"samples": samples, "seed": seed, "settings": asdict(settings), "batch": batch}
    _write(out, found, {**found.record(), **asked, **made_with, **_environment(decoder), "data": data_used})
    _note(found.figures, *runs.values())
    _require_equal(found.figures.get("understanding"), mllm, out)


def _measure(
    decoder: LatentDecoder,
    data_sets: DataSets,
    how: How,
    truth: Mapping[str, Scene] | None,
    gallery: int | None,
    mllm: Path | None,
) -> Measured:
    if mllm is None:
        return _measure_reconstruction(decoder, data_sets, how)
    decoder.check(how[2])
    if truth is None:
        return _measure_retrieval(decoder, data_sets, how, gallery)
    return _measure_scenes(decoder, data_sets, truth, how, mllm)


def _measure_reconstruction(decoder: LatentDecoder, data_sets: DataSets, how: How) -> ReconstructionEvaluation:
    from ..evaluation.reconstruction import evaluate_reconstruction
    from ..inference.generator import Generator

    assert isinstance(decoder, Generator)
    return evaluate_reconstruction(decoder, *data_sets, *how)


def _measure_retrieval(decoder: LatentDecoder, data_sets: DataSets, how: How, gallery: int | None) -> Evaluation:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.samples import GALLERY
    from ..inference.generator import Generator

    assert isinstance(decoder, Generator)
    return evaluate(decoder, *data_sets, *how, gallery or GALLERY)


def _measure_scenes(
    decoder: LatentDecoder,
    data_sets: DataSets,
    truth: Mapping[str, Scene],
    how: How,
    mllm: Path,
) -> SceneEvaluation:
    from ..evaluation.scenes import evaluate_scenes
    from ..evaluation.understanding import measure_understanding
    from ..inference.generator import base_folder

    (_, heldout), (_, seed, _, _) = data_sets, how
    found = evaluate_scenes(decoder, *data_sets, truth, *how)
    asked = found.samples["train" if heldout is None else "heldout"]
    found.understanding = measure_understanding(decoder, base_folder(mllm), asked, seed)
    return found


def _load(mllm: Path | None, controlnet: Path | None, flux: str | None, ranked: bool) -> LatentDecoder:
    """The models, on every rank: of both stages, or of the one that is given."""
    from ..distributed.process_group import Group, join
    from ..inference.generator import Generator
    from ..inference.latent_decoder import load_decoder

    ranks = join() if ranked else None
    group = Group(ranks.rank, ranks.size, ranks.gather) if ranks else Group()
    device = ranks and ranks.device
    load: Callable[[], LatentDecoder]
    if controlnet is None:
        assert mllm is not None, "one of them is given"
        load = partial(load_decoder, mllm, device, group=group)
    elif mllm is None:
        load = partial(Generator.load_without_branch, controlnet, flux, device, group=group)
    else:
        load = partial(Generator.load, mllm, controlnet, flux, device, group=group)
    with progress("loading the models", shown=group.rank == 0):
        return ranks.agreed(load) if ranks else load()


def _environment(decoder: LatentDecoder) -> dict[str, Any]:
    from ..inference.generator import Generator

    return {
        **({"flux": str(decoder.flux.folder.path)} if isinstance(decoder, Generator) else {}),
        "device": str(decoder.device),
        "dtype": str(next(decoder.mllm.parameters()).dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": versions(VERSIONS),
    }


def _data(found: Measured, name: str, shards: str, dataset: Dataset) -> dict[str, Any]:
    """Which samples of a data set were evaluated."""
    return {
        "shards": shards,
        "fingerprint": dataset.fingerprint,
        "keys": [sample.key for sample in found.samples[name]],
        "captions": [sample.caption for sample in found.samples[name]],
        "image_seeds": found.image_seeds[name],
    }


def _write(out: Path, found: Measured, record: dict[str, Any]) -> None:
    """Write the files of `out`, and print the table."""
    from ..evaluation.tables import table

    text = table(found)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_png(out / SHEET, found.contact_sheet)
        write_atomic(out / TABLE, text.encode())
        write_json(out / METRICS, record)
    print(text, end="")
    print(f"{out}: {METRICS}, {TABLE}, {SHEET}")


def _note(figures: dict[str, Any], *runs: Path) -> None:
    """Add the metrics to the run folders and their mirrors."""
    from ..inference.stored_runs import run_and_step

    for run, step in map(run_and_step, runs):
        if problem := note_evaluation(run, step or 0, figures):
            print(problem, file=sys.stderr)


def _require_equal(answers: dict[str, Any] | None, mllm: Path | None, out: Path) -> None:
    """RunError if stage 1 has changed the MLLM's answers."""
    if answers and not answers["equal"]:
        raise RunError(
            f"{mllm}: the MLLM's logits differ from those before stage 1, see {out / METRICS}: its frozen weights have"
            " changed, which is an error of this program; report it"
        )


def _check_stages(
    mllm: Path | None,
    controlnet: Path | None,
    flux: str | None,
    scenes: Path | None,
    gallery: int | None,
    shape: str | None,
) -> None:
    """RunError for options that do not go together."""
    if mllm is None and (controlnet is None or scenes or gallery):
        raise RunError(
            "without --mllm RUN only reconstructions are measured: they need --controlnet RUN, and neither"
            " --scenes nor --gallery"
        )
    if controlnet is None and (scenes is None or flux):
        raise RunError("only --scenes measures a stage 1 without --controlnet and --flux; give --controlnet RUN")
    if scenes and gallery:
        raise RunError("--gallery is for retrieval, which --scenes replaces; leave one of them out")
    if scenes and shape:
        raise RunError("--scenes are squares; leave out --shape")


def _check(out: Path) -> None:
    """RunError unless `out` is new, empty, or contains only an evaluation."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is not a folder")
    others = sorted({path.name for path in out.iterdir()} - {METRICS, TABLE, SHEET}) if out.is_dir() else []
    if others:
        raise RunError(f"{out}: is not empty ({others[0]}) and was not made by `bifrost eval`; name a new folder")
