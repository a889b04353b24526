"""The built wheel is complete: installed elsewhere, it trains the demo recipe from another folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bifrost
import runs

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
