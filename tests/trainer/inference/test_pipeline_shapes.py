"""The pipeline makes images in the shapes of both stages' buckets, and edits source images, as `bifrost generate`."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import ranked
import run_folders
from bifrost import BifrostPipeline
from bifrost.data.transforms import decode_shapes
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.export_pipeline import export_pipeline
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
NOT_BOTH = r"the two stages were not both trained in it \(data.buckets\)"
EDITS = "data.sources=[{name: edits, shards: edits, task: editing}]"
FEW: dict[str, Any] = {"steps": 6, "num_inference_steps": 2, "seed": 4}
QUICK = Settings(6, flux=Sampling(2))
FRESH = """
import sys
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from PIL import Image
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
few = {"steps": 6, "num_inference_steps": 2, "seed": 4, "height": 48, "width": 80}
pipe("make it blue", image=Image.open(sys.argv[2]), empty_prompt=True, **few).images[0].save("diffusers.png")
"""


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def runs_of_both(place: Path, flux: Path) -> tuple[Path, Path]:
    """Stage 1 on editing pairs and stage 2, both in three shapes."""
    changes = ["branch.positions=mrope", "ema=null", "data.shards=null", EDITS, BUCKETS]
    first = run_folders.save(place / "wide-edits", load_recipe("tiny-mllm", changes), 5)
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null", BUCKETS])
    return first, run_folders.save(place / "wide-controlnet", recipe, 6)


@pytest.fixture(scope="module")
def folder(place: Path, runs_of_both: tuple[Path, Path]) -> Path:
    export_pipeline(*runs_of_both, place / "wide-pipeline")
    return place / "wide-pipeline"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> BifrostPipeline:
    found = BifrostPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def both(runs_of_both: tuple[Path, Path]) -> Generator:
    return Generator.load(*runs_of_both)


def test_the_command_and_a_fresh_process_of_diffusers_give_the_same_image(
    folder: Path, runs_of_both: tuple[Path, Path], pipe: BifrostPipeline, drawing: Path, tmp_path: Path
) -> None:
    first, second = runs_of_both
    asked = ["--shape", "80x48", "--source", str(drawing), "--empty-prompt"]
    few = ["--steps", "6", "--flux-steps", "2", "--seed", "4", "--out", str(tmp_path / "out")]
    runs = ["--mllm", str(first), "--controlnet", str(second)]
    (ended,) = ranked.bifrost(1, "generate", *runs, *asked, *few, "make it blue")
    assert ended.code == 0, ended.err
    wanted = Image.open(tmp_path / "out" / "00000-make-it-blue.png")
    assert wanted.size == (80, 48) and np.asarray(wanted).std() > 10
    given = {"image": Image.open(drawing), "empty_prompt": True, "height": 48, "width": 80, **FEW}
    assert same(pipe("make it blue", **given).images[0], wanted)
    command = [sys.executable, "-c", FRESH, str(folder), str(drawing)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(Image.open(tmp_path / "diffusers.png"), wanted)


@pytest.mark.parametrize(("width", "height"), [(80, 48), (48, 80), (64, 64), (None, None), (64, None)])
def test_every_shape_has_the_images_of_the_generator(
    pipe: BifrostPipeline, both: Generator, width: int | None, height: int | None
) -> None:
    settings = replace(QUICK, shape=f"{width or 64}x{height or 64}")
    found = pipe(["moon", "a red sun"], height=height, width=width, **FEW).images
    for one, other in zip(found, both.generate(["moon", "a red sun"], [4, 4], settings), strict=True):
        assert one.size == (width or 64, height or 64)
        assert same(one, other)


def test_arrays_and_given_latents_have_the_shape(pipe: BifrostPipeline, both: Generator) -> None:
    latents = both.latents(["an owl"], [9], replace(QUICK, shape="80x48"))
    given = {"height": 48, "width": 80, "patch_latents": latents, **FEW}
    (wanted,) = both.generate(["moon"], [4], replace(QUICK, shape="80x48"), latents)
    assert same(pipe("moon", **given).images[0], wanted)
    assert pipe("moon", output_type="np", **given).images.shape == (1, 48, 80, 3)
    assert pipe("moon", output_type="pt", **given).images.shape == (1, 3, 48, 80)
    assert pipe("moon", output_type="latent", **given).images.shape == (1, 4, 12, 20)


def test_source_images_of_several_prompts(pipe: BifrostPipeline, both: Generator, drawing: Path) -> None:
    """One for all prompts, or one for each; copies of a prompt have its own."""
    opened = Image.open(drawing)
    other = opened.transpose(Image.Transpose.ROTATE_180)
    prompts = ["make it blue", "remove the owl"]
    mine, turned = (both.source_image(each) for each in (drawing.read_bytes(), other))
    assert not torch.equal(mine, turned)
    found = pipe(prompts, image=[opened, other], num_images_per_prompt=2, **FEW).images
    sources = [mine, mine, turned, turned]
    wanted = both.generate([prompts[0]] * 2 + [prompts[1]] * 2, [4, 5, 4, 5], QUICK, sources=sources)
    assert [same(*pair) for pair in zip(found, wanted, strict=True)] == [True] * 4
    shared = pipe(prompts, image=other, **FEW).images
    wanted = both.generate(prompts, [4, 4], QUICK, sources=[turned, turned])
    assert [same(*pair) for pair in zip(shared, wanted, strict=True)] == [True] * 2
    assert not same(shared[0], pipe(prompts, **FEW).images[0]), "the source matters"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_an_opened_image_is_read_as_its_file(both: Generator, mode: str) -> None:
    """Of any mode, and turned as its EXIF states; a JPEG unless it is large enough to be decoded smaller."""
    pixels = np.random.default_rng(1).integers(0, 256, (90, 130, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG")[: 1 + (mode in ("RGB", "L"))]:
        file = io.BytesIO()
        image.save(file, kind, exif=exif)
        opened = Image.open(io.BytesIO(file.getvalue()))
        settings = replace(QUICK, shape="48x80")
        wanted = decode_shapes(file.getvalue(), [(140, 84)])[0].transpose(2, 0, 1)
        assert np.array_equal(both.source_image(opened, settings), wanted), kind
        assert opened.size == (130, 90), "the caller's image is not changed"


def test_what_cannot_be_used_is_one_line(pipe: BifrostPipeline, drawing: Path) -> None:
    image = Image.open(drawing)
    cut = Image.open(io.BytesIO(drawing.read_bytes()[:-100]))
    for arguments, message in (
        ({"image": cut}, "^image: image does not decode: image file is truncated"),
        ({"image": Image.new("F", (9, 9), 0.5)}, "^image: its mode, F, does not say which value is white"),
        ({"image": Image.new("RGB", (0, 9))}, "^image: it has no pixels"),
        ({"width": 80}, f"^shape 80x64: {NOT_BOTH}; give shape 64x64 or 80x48 or 48x80$"),
        ({"width": 72, "height": 0}, f"^shape 72x0: {NOT_BOTH}; give shape 64x64 or"),
        ({"width": 80, "height": 48, "steps": 16}, "^16 decoding steps for 15 patches: set 1 to 15"),
        ({"image": str(drawing)}, "^image: give a PIL image, or a list of one for each prompt$"),
        ({"image": np.asarray(image)}, "^image: give a PIL image"),
        ({"image": [image, None]}, "^image: give a PIL image"),
        ({"image": [image, image]}, "^image: 2 for 1 prompts: give one for each, or one for all$"),
        (
            {"image": image, "patch_latents": torch.zeros(1, 16, 192)},
            "^image is read to decode latents, and with patch_latents none are decoded: leave one out$",
        ),
        (
            {"width": 80, "height": 48, "patch_latents": torch.zeros(1, 16, 192)},
            r"^patch_latents: of shape \[1, 16, 192\]; give \[1, 15, 192\]",
        ),
    ):
        with pytest.raises(RunError, match=message) as caught:
            pipe(**{"prompt": "moon", **FEW, **arguments})
        assert "\n" not in str(caught.value)


def test_the_folder_carries_what_it_needs(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["buckets"] == {"ratios": ["1x1", "3x2", "2x3"], "areas": None, "max_upscale": 2.0}
    assert BifrostPipeline.load_config(folder)["buckets"] == index["buckets"]
    card = " ".join(ModelCard.load(folder / "README.md").text.split())
    assert "64 x 64, 80 x 48 or 48 x 80 pixels, width by height" in card and "the square is the default" in card
    assert "`image` takes a source image" in card


def test_runs_without_a_square_or_without_editing(
    runs_of_both: tuple[Path, Path], mllm: Path, controlnet: Path, drawing: Path, flux: Path, tmp_path: Path
) -> None:
    """A card states which shape to give; what the exported runs were not trained for is refused as in `generate`."""
    oblong = "data.buckets={ratios: [3x2, 2x3]}"
    recipe = load_recipe("tiny-mllm", ["branch.positions=mrope", "ema=null", oblong])
    first = run_folders.save(tmp_path / "oblong", recipe, 7)
    export_pipeline(first, runs_of_both[1], tmp_path / "pipeline")
    card = " ".join(ModelCard.load(tmp_path / "pipeline" / "README.md").text.split())
    assert "80 x 48 or 48 x 80 pixels" in card and "default" not in card and "source image" not in card
    assert 'dog", steps=16, width=80, height=48)' in card
    found = BifrostPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(RunError, match=r"^shape 64x64: the two stages were not both .*; give shape 80x48 or 48x80$"):
        found("moon", **FEW)
    assert found("moon", width=80, height=48, **FEW).images[0].size == (80, 48)
    with pytest.raises(RunError, match=r"^the stage-1 run was not trained on editing pairs"):
        found("moon", width=80, height=48, image=Image.open(drawing), **FEW)
    with pytest.raises(RunError, match=r"^the two stages have no shape of images in common .*; train both in the same"):
        export_pipeline(first, controlnet, tmp_path / "other")
    assert not (tmp_path / "other").exists()
