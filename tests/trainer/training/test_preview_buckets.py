"""Previews of runs in aspect-ratio buckets have the shapes of their images, and do not change the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ranked
import run_folders
import runs
import shaped_shards
import tiny_flux
from bifrost.data import open_dataset, write_shard
from bifrost.recipes import load_recipe
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Settings
from images import equal

pytestmark = [pytest.mark.multi, pytest.mark.slow]
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
SHAPES = ["64x64", "80x48", "48x80", "64x64"]
"""Of the first readable images of shaped_shards: numbers 0, 1, 2 and 4."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return shaped_shards.save(tmp_path_factory.mktemp("shapes"), 2)


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory, flux: Path) -> Path:
    """A stage-2 run in three shapes."""
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null", BUCKETS])
    return run_folders.save(tmp_path_factory.mktemp("bucketed") / "controlnet", recipe, 2)


def shown(arguments: list[str], folder: str) -> None:
    """Train, and write the images of each contact sheet to `folder`, LABEL-NUMBER.png."""
    from bifrost.trainer.training import preview

    make = preview.make_contact_sheet

    def noted(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
        for label, images in rows.items():
            for number, image in enumerate(images):
                image.save(f"{folder}/{label}-{number}.png")
        return make(rows, captions)

    preview.make_contact_sheet = noted  # type: ignore[assignment]
    ranked.command(arguments)


def train(shards: Path, runs_dir: Path, recipe: str, ranks: int, *settings: str) -> tuple[Path, list[ranked.Rank]]:
    own = ("data.max_bad_fraction=1", f"micro_batch={8 // ranks}", "steps=2", "ema=null", BUCKETS, *settings)
    arguments = runs.arguments(shards, runs_dir, *runs.TINY, *own, recipe=recipe)
    runs_dir.mkdir(exist_ok=True)
    ended = ranked.run(shown, ranks, arguments, str(runs_dir))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / recipe, ended


def samples(shapes: Path) -> list[Any]:
    data = open_dataset(f"{shapes}/train-*.tar")
    return [data.read(0, number) for number in (0, 1, 2, 4)]


def test_stage_2_reconstructs_every_image_in_its_shape(shapes: Path, flux: Path, tmp_path: Path) -> None:
    own = (f"flux.path={flux}", "optimizer.lr=3e-3")
    run, _ = train(shapes, tmp_path / "seen", "tiny-controlnet", 2, *own, "previews.every=2")
    calm, _ = train(shapes, tmp_path / "calm", "tiny-controlnet", 2, *own)
    assert runs.losses(run) == runs.losses(calm)
    generator = Generator.load_without_branch(run, dtype=torch.float32)
    for number, (raw, shape) in enumerate(zip(samples(shapes), SHAPES, strict=True)):
        settings = Settings(shape=shape)
        latents = generator.encode_file(raw.image, settings)
        (wanted,) = generator.generate([raw.caption], [number], settings, latents)
        found, original = (Image.open(tmp_path / "seen" / f"{row}-{number}.png") for row in ("its latents", "original"))
        assert equal(found, wanted), number
        assert original.size == wanted.size == tuple(map(int, shape.split("x")))
    assert (run / "previews" / "step-00000002.png").is_file()


def test_stage_1_generates_in_the_shapes_of_the_images(shapes: Path, controlnet: Path, tmp_path: Path) -> None:
    own = (f"previews.controlnet={controlnet}", "previews.every=2", "optimizer.lr=3e-3")
    run, _ = train(shapes, tmp_path / "seen", "tiny-mllm", 2, *own)
    generator = Generator.load(run, controlnet, dtype=torch.float32)
    for number, (raw, shape) in enumerate(zip(samples(shapes), SHAPES, strict=True)):
        settings = Settings(16 if shape == "64x64" else 15, shape=shape)
        (wanted,) = generator.generate([raw.caption], [number], settings)
        assert equal(Image.open(tmp_path / "seen" / f"generated-{number}.png"), wanted), number
        assert wanted.size == tuple(map(int, shape.split("x")))


def test_a_source_image_has_the_shape_of_its_target(controlnet: Path, tmp_path: Path) -> None:
    pairs = []
    for number in range(8):
        drawings = (shaped_shards.drawing(number + more, size) for more, size in ((0, (96, 64)), (100, (70, 90))))
        files = dict(zip(("png", "source.png"), drawings, strict=True))
        pairs.append((f"edit-{number}", {**files, "txt": b"make it blue"}))
    write_shard(tmp_path / "pairs" / "train-00000.tar", pairs)
    sources = f"data.sources=[{{name: edits, shards: {tmp_path}/pairs, task: editing}}]"
    own = (f"previews.controlnet={controlnet}", "previews.every=2", "previews.count=1", "data.shards=null", sources)
    run, _ = train(tmp_path / "pairs", tmp_path / "seen", "tiny-mllm", 1, *own)
    generator, settings = Generator.load(run, controlnet, dtype=torch.float32), Settings(15, shape="80x48")
    found = Image.open(tmp_path / "seen" / "generated-0.png")
    for source, agrees in ((pairs[0][1]["source.png"], True), (pairs[1][1]["source.png"], False)):
        shown = generator.source_image(source, settings)
        (wanted,) = generator.generate(["make it blue"], [0], settings, sources=[shown])
        assert wanted.size == (80, 48) and equal(found, wanted) == agrees


def test_a_controlnet_of_squares_makes_squares_and_says_so(shapes: Path, flux: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null"])
    squares = run_folders.save(tmp_path / "squares", recipe, 2)
    own = (f"previews.controlnet={squares}", "previews.every=2")
    _, (ended,) = train(shapes, tmp_path / "seen", "tiny-mllm", 1, *own)
    assert ended.err.count("previews: the ControlNet was not trained in 140x84, 84x140: squares in place of these") == 1
    assert {Image.open(file).size for file in (tmp_path / "seen").glob("generated-*.png")} == {(64, 64)}
