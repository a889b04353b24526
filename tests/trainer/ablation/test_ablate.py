"""`bifrost ablate` with real trainings of two steps: what it runs, what it does not repeat, what it survives."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import small_model
import small_world
from bifrost.slurm.exit_codes import STOPPED
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes, and a suite of two trainings and three evaluations for one seed."""
    folder = tmp_path_factory.mktemp("ablate")
    small_world.write(folder / "demo")
    settings = ["steps=2", "global_batch=8", "micro_batch=2", "log_every=1", "data.workers=0"]
    settings += ["tracking.enabled=false", "data.shards=demo/train-*.tar", *small_model.settings(folder / "backbone")]
    score = ["--data=demo/train-*.tar", "--heldout=demo/heldout-*.tar", "--scenes=demo/KEY.json", "--samples=2"]
    score += ["--steps=4"]  # of 4 patches
    questions = {
        "loss": {"asks": "Which?", "paper": "all", "rows": {"all": [], "masked": ["branch.loss_tokens=masked"]}},
        "decoding": {"asks": "How many?", "paper": "4", "rows": {"4": [], "1": ["--steps=1"]}},
    }
    suite = {"recipe": "tiny-mllm", "seeds": [3], "settings": settings, "score": score, "categories": ["two"]}
    (folder / "suite.yaml").write_text(yaml.safe_dump({**suite, "questions": questions}, sort_keys=False))
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "bifrost.trainer", "ablate", "suite.yaml", "--out=out", *words]


def bifrost(place: Path, *words: str) -> str:
    ended = subprocess.run(command(*words), cwd=place, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_suite_from_a_stop_to_its_table(place: Path) -> None:
    planned = bifrost(place, "--dry-run").splitlines()
    assert [line.split()[1] for line in planned] == ["train", "eval", "train", "eval", "eval"]
    assert not (place / "out").exists()

    with subprocess.Popen(command(), cwd=place, stdout=subprocess.PIPE, text=True) as running:
        run = place / "out" / "runs" / "usual-3"
        while not (run / "recipe.yaml").exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=120)
    assert running.returncode == STOPPED and "table" not in out

    shown = bifrost(place)
    left = [line.split("bifrost ")[1] for line in shown.splitlines() if line.startswith("[")]
    assert {f"bifrost {line}" for line in left} <= {" ".join(shlex.split(line)) for line in planned} and len(left) >= 4
    table = (place / "out" / "table.md").read_text()
    assert table in shown and "| masked | 1 |" in table and "| 1 | 1 |" in table
    for score in (place / "out" / "scores").iterdir():
        record = json.loads((score / "metrics.json").read_text())
        assert set(record["scenes"]["heldout"]) == {"probe", "probe_true", "probe_shuffled"}
        assert "flux" not in record and "controlnet" not in record
    assert (
        json.loads((place / "out" / "scores" / "usual-3-steps-1" / "metrics.json").read_text())["settings"]["steps"]
        == 1
    )
    assert (place / "out" / "plot.svg").read_bytes().startswith(b"<?xml")

    assert bifrost(place, "--dry-run") == ""
    again = bifrost(place)
    assert "[" not in again.split("**")[0] and table in again


def test_a_row_that_fails_does_not_stop_the_others(place: Path) -> None:
    suite = yaml.safe_load((place / "suite.yaml").read_text())
    suite["questions"]["loss"]["rows"]["lost"] = ["data.shards=nothing.tar"]
    (place / "failing.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    words = ["ablate", "failing.yaml", "--out=failing", "--only=loss"]
    ended = subprocess.run([sys.executable, "-m", "bifrost.trainer", *words], cwd=place, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "failed: loss, lost, seed 3: exit code 2 of train" in ended.stderr
    assert "| masked | 1 |" in (place / "failing" / "table.md").read_text()


def test_another_suite_in_the_same_folder_is_refused(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    suite = yaml.safe_load((place / "suite.yaml").read_text())
    (place / "taken").mkdir()
    (place / "taken" / "suite.json").write_text(json.dumps({**suite, "settings": ["steps=3"]}))
    with pytest.raises(RunError, match="its trials have another settings; name another folder with --out"):
        CliRunner().invoke(app, ["ablate", "suite.yaml", "--out=taken"], catch_exceptions=False)


def test_the_trainings_of_a_cluster(place: Path, monkeypatch, tmp_path: Path) -> None:
    """--slurm prints commands that `bifrost slurm` accepts; here it renders their scripts."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("BIFROST_SITE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a site file
    printed = CliRunner().invoke(app, ["ablate", "suite.yaml", "--out=far", "--slurm=--nodes 2 --gpus-per-node 2"])
    lines = printed.stdout.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("bifrost slurm submit --nodes 2 --gpus-per-node 2 ") for line in lines
    )
    for line in lines:
        words = shlex.split(line)[1:]
        words[1] = "render"
        rendered = CliRunner().invoke(app, words, catch_exceptions=False)
        assert rendered.exit_code == 0 and "#SBATCH --nodes=2" in rendered.stdout
