"""The built wheel is complete: installed elsewhere, it trains the demo recipe from another folder."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import bifrost
import run_folders
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.inference.export_pipeline import export_pipeline

ROOT = Path(__file__).parents[2]
FOLDERS = {"package": "", "kernels": "kernels", "data": "data", "recipes": "recipes", "slurm": "slurm"}
FOLDERS["trainer"] = "trainer"
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this tree installed, without dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in the tree
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    build = ["wheel", *options, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", *options, "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder / "site"


def test_wheel_contains_every_file(site: Path) -> None:
    for folder, installed in FOLDERS.items():
        files = {file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*") if file.is_file()}
        wanted = {file for file in files if "__pycache__" not in file.parts}
        assert len(wanted) >= 2
        missing = [file for file in wanted if not (site / "bifrost" / installed / file).is_file()]
        assert not missing, f"{folder}: add these to package_data in setup.py: {missing}"


def test_wheel_contains_all_licences(site: Path) -> None:
    """The licence of the code, and next to each bundled model that of the drawings on which it was trained."""
    (about,) = site.glob("bifrost_train-*.dist-info")
    metadata = (about / "METADATA").read_text()
    assert f"Version: {bifrost.__version__}\n" in metadata
    assert "License: Apache-2.0 AND CC-BY-SA-4.0\n" in metadata
    assert "Apache License" in (about / "licenses" / "LICENSE").read_text()
    weights = {file for file in (site / "bifrost").rglob("*.safetensors")}
    models = {file.relative_to(site / "bifrost" / "recipes" / "foundations").parts[0] for file in weights}
    assert models >= {"tiny", "tiny-flux"}
    for model in models:
        inside = site / "bifrost" / "recipes" / "foundations" / model / "LICENSE.txt"
        for notice in (inside, about / "licenses" / "recipes" / "foundations" / model / "LICENSE.txt"):
            text = notice.read_text()
            assert "https://openmoji.org" in text and "https://creativecommons.org/licenses/by-sa/4.0/" in text


@pytest.mark.slow
def test_wheel_trains_from_another_folder(site: Path, shards: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    arguments = runs.arguments(shards, tmp_path, "steps=2")
    with_origin = "import bifrost, sys; print(bifrost.__file__); from bifrost.trainer.__main__ import start; start()"
    ended = subprocess.run(
        [sys.executable, "-c", with_origin, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[0] == str(site / "bifrost" / "__init__.py")
    assert [line["step"] for line in runs.steps(tmp_path / "tiny-mllm")] == [1, 2]
    script = subprocess.run(
        [site / "bin" / "bifrost", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert script.stdout.startswith("bifrost ") and script.returncode == 0, script.stderr


GENERATE = """
import sys
import torch
torch.set_num_threads(1)
from bifrost import BifrostPipeline
pipe = BifrostPipeline.from_pretrained(sys.argv[1])
pipe("two owls above a moon", steps=2, num_inference_steps=2, seed=5).images[0].save(sys.argv[2])
"""


def required(*names: str) -> set[str]:
    """The distributions `names` with all that they require, without extras."""
    found, left = set(), list(names)
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            wanted = [Requirement(line) for line in metadata.requires(name) or []]
            left += [one.name for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_a_pipeline_needs_only_torch_transformers_and_diffusers(site: Path, tmp_path: Path) -> None:
    """In an environment with these and the wheel alone it gives the image of this one, to the bit. Triton is required
    by PyPI's torch, but not by its CPU build."""
    alone = tmp_path / "site-packages"
    alone.mkdir()
    for name in required("torch", "transformers", "diffusers", "triton"):
        for file in {Path(file.parts[0]) for file in metadata.files(name) or [] if ".." not in file.parts}:
            placed = Path(str(metadata.distribution(name).locate_file(file)))
            if not (alone / file).exists() and placed.name != "__pycache__":
                (alone / file).symlink_to(placed)
    (alone / "bifrost").symlink_to(site / "bifrost")

    braces = "data.shards=demo/train-{00000..00005}.tar"
    mllm = run_folders.save(tmp_path / "mllm", load_recipe("tiny-mllm", [braces]), 1)
    controlnet = run_folders.save(tmp_path / "controlnet", load_recipe("tiny-controlnet", [braces]), 2)
    export_pipeline(mllm, controlnet, tmp_path / "pipeline")
    images = []
    for options, path in ((["-S"], alone), ([], site)):
        out = tmp_path / f"{len(options)}.png"
        environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, *options, "-c", GENERATE, str(tmp_path / "pipeline"), str(out)]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        images.append(np.asarray(Image.open(out)))
    assert images[0].std() > 10 and np.array_equal(*images)
