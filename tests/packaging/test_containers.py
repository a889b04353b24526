"""The container files, as far as they can be checked without a container runtime: they copy exactly what is needed to
install, both run the same script, and it installs the pinned versions."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import yaml

from bifrost.slurm.site import Site

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
DEFINITION = (FOLDER / "bifrost.def").read_text()
INSIDE = "/opt/bifrost/"


def copied_by_docker() -> dict[str, str]:
    """Path in the repository -> path in the image."""
    found = {}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, flags=re.M):
        *sources, target = line.split()
        for source in sources:
            found[source] = target + Path(source).name if target.endswith("/") else target
    return found


def copied_by_apptainer() -> dict[str, str]:
    section = DEFINITION.split("%files\n")[1].split("\n\n")[0]
    return dict(line.split() for line in section.splitlines())


def test_both_copy_the_sources_of_a_wheel() -> None:
    wheel = runpy.run_path(str(ROOT / "tests" / "packaging" / "test_wheel.py"))
    wanted = {*wheel["FOLDERS"], *wheel["FILES"], "constraints.txt", "containers/install.sh"}
    assert copied_by_docker() == copied_by_apptainer() == {path: INSIDE + path for path in wanted}
    assert all((ROOT / path).exists() for path in wanted)


def test_both_use_the_same_supported_python() -> None:
    (image,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.M)
    assert re.findall(r"^From: (\S+)$", DEFINITION, flags=re.M) == [image]
    python = re.fullmatch(r"python:(3\.\d+)-slim-bookworm", image)
    assert python and f'"Programming Language :: Python :: {python[1]}"' in (ROOT / "setup.py").read_text()


def test_both_run_the_script_and_ignore_user_packages() -> None:
    assert re.search(rf"^RUN {INSIDE}containers/install\.sh$", DOCKERFILE, flags=re.M)
    assert DEFINITION.split("%post\n")[1].split("\n\n")[0].strip() == f"{INSIDE}containers/install.sh"
    assert "PYTHONNOUSERSITE=1" in DOCKERFILE and "export PYTHONNOUSERSITE=1" in DEFINITION


def test_script_installs_the_pinned_versions(tmp_path: Path) -> None:
    """With fakes for the programs that change the machine."""
    inside = tmp_path / "image"
    for path in copied_by_docker():
        (inside / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_file():
            shutil.copy(ROOT / path, inside / path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("apt-get", "pip", "bifrost", "rm"):
        (programs / name).write_text(f'#!/bin/sh\necho "$PWD {name} $*" >> "{tmp_path}/calls"\n')
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.defpath}"}
    subprocess.run([inside / "containers" / "install.sh"], cwd="/", env=path, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    (install,) = [call for call in calls if f"{inside} pip install" in call]
    assert install.endswith(" --constraint constraints.txt .[s3]") and (inside / "constraints.txt").is_file()
    assert '"s3": [' in (inside / "setup.py").read_text()
    assert calls[-1] == f"{inside} bifrost --version"


def test_site_files_in_the_docs_are_valid() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    section = page.split("## Containers")[1].split("\n## ")[0]
    shown = [yaml.safe_load(block) for block in re.findall(r"^```text\n(.*?)^```$", section, flags=re.M | re.S)]
    kinds = [site.container.kind for site in map(Site.model_validate, shown) if site.container]
    assert kinds == ["pyxis", "apptainer"]
