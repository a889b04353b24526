"""Run folders of both stages with random weights, and what generates from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_folders
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.trainer.inference.generator import Generator


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="session")
def flux(place: Path) -> Path:
    made = tiny_flux.pipeline()
    with torch.no_grad():  # the text must affect the image
        made.transformer.proj_out.weight.mul_(3)
        made.transformer.context_embedder.weight.mul_(20)
    return tiny_flux.save(made, place / "flux")


@pytest.fixture(scope="session")
def mllm(place: Path) -> Path:
    return run_folders.save(
        place / "mllm", load_recipe("tiny-mllm", ["branch.positions=learned"]), 1, ("master", "ema")
    )


@pytest.fixture(scope="session")
def controlnet(place: Path, flux: Path) -> Path:
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null"])
    return run_folders.save(place / "controlnet", recipe, 2)


@pytest.fixture(scope="session")
def generator(mllm: Path, controlnet: Path) -> Generator:
    return Generator.load(mllm, controlnet)


@pytest.fixture(scope="session")
def drawing(place: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 96), Image.Resampling.BICUBIC).save(place / "drawing.png")
    return place / "drawing.png"
