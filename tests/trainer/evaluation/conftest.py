"""A stage-1 and a stage-2 run with random weights, and their generator."""

from pathlib import Path

import pytest

import run_folders
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.trainer.inference.generator import Generator


@pytest.fixture(scope="package")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="package")
def mllm(place: Path) -> Path:
    return run_folders.save(place / "mllm", load_recipe("tiny-mllm", ["ema=null"]), 1)


@pytest.fixture(scope="package")
def controlnet(place: Path) -> Path:
    flux = tiny_flux.save(tiny_flux.pipeline(), place / "flux")
    return run_folders.save(place / "controlnet", load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null"]), 2)


@pytest.fixture(scope="package")
def generator(mllm: Path, controlnet: Path) -> Generator:
    return Generator.load(mllm, controlnet)
