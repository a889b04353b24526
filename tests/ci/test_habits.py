"""Files read by external services (workflows, pre-commit, citation) agree with the declarations in this tree."""

import re
import subprocess
from pathlib import Path

import yaml

import bifrost

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), flags=re.M))
SETUP = (ROOT / "setup.py").read_text()


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def steps(workflow: str) -> list[str]:
    (job,) = read(f".github/workflows/{workflow}")["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def test_workflow_runs_ci_on_every_python() -> None:
    (command,) = steps("ci.yml")
    assert command.split()[-1] == ".ci/run"
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETUP)


def test_gpu_workflow_uses_existing_make_targets() -> None:
    commands = steps("gpu.yml")
    assert len(commands) == 2
    for command in commands:
        words = command.replace('"$PWD/', "").replace('"', "").split()
        assert words[0] == "make"
        made = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "-m pytest" in made or "kernels.bench" in made


def test_pre_commit_uses_the_pinned_versions() -> None:
    ruff, local = read(".pre-commit-config.yaml")["repos"]
    assert ruff["repo"].endswith("/ruff-pre-commit") and ruff["rev"] == f"v{PINS['ruff']}"
    (words,) = local["hooks"]
    assert words["additional_dependencies"] == [f"pyyaml=={PINS['PyYAML']}"]
    assert (ROOT / words["entry"].split()[-1]).is_file()


def test_citation_has_the_licence_and_no_version() -> None:
    citation = read("CITATION.cff")
    assert f'license="{citation["license"]} AND ' in SETUP
    assert "version" not in citation, "it would go stale: package/__init__.py has the version"
    (paper,) = citation["references"]
    assert "2508.05954" in paper["url"] and len(paper["authors"]) == 5


def test_changelog_has_the_version() -> None:
    titles = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert titles[0] == "Unreleased" and titles[1] == bifrost.__version__
