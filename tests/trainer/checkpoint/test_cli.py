import os
import re
import time

import pytest
from typer.testing import CliRunner

from bifrost.trainer.cli.checkpoint import app, shown
from bifrost.trainer.errors import RunError


@pytest.fixture
def run_folder(tmp_path, save):
    for step in (100, 200):
        save(tmp_path / "checkpoints", step, ranks=2)
    return tmp_path


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def damage(run_folder):
    (run_folder / "checkpoints" / "step-00000200" / "rank-00001.safetensors").write_bytes(b"")


def test_list(run_folder):
    damage(run_folder)
    (run_folder / "checkpoints" / "step-00000300").mkdir()
    result = invoke("list", run_folder)
    assert result.exit_code == 0
    rows = [re.findall(r"[^\s│]+", line) for line in result.output.splitlines() if "00 " in line]
    assert [(row[0], row[-1]) for row in rows] == [("100", "yes"), ("200", "no"), ("300", "no")]
    assert rows[0][-2] == "KiB"
    assert "step-00000200/rank-00001.safetensors: truncated" in result.output
    assert "step-00000300/manifest.json: missing" in result.output


def test_verify(run_folder):
    result = invoke("verify", run_folder)
    assert result.exit_code == 0
    assert result.output.splitlines() == ["step-00000100: verified", "step-00000200: verified"]
    damage(run_folder)
    result = invoke("verify", run_folder)
    assert result.exit_code == 1
    assert "step-00000200/rank-00001.safetensors: truncated, 0 of" in result.output
    assert invoke("verify", run_folder, "--step", 100).exit_code == 0
    assert invoke("verify", run_folder, "--step", 200).exit_code == 1


def test_show(run_folder):
    result = invoke("show", run_folder)
    assert result.exit_code == 0
    for text in (
        "step-00000200",
        "saved by 2 ranks",
        "master, exp_avg",
        "seed",
        "layer.weight",
        "5 x 3",
        "scalar",
        "19",
    ):
        assert text in result.output
    assert "step-00000100" in invoke("show", run_folder, "--step", 100).output


def test_a_state_is_shown_for_people():
    window = [[0.1 + 0.01 * i, 2.0 - 0.01 * i] for i in range(100)]
    assert shown(window) == "100 entries, 0.1 to 1.09, 1.01 to 2"
    assert shown([0.9, 0.95]) == "0.9, 0.95" and shown([]) == "none"
    assert (shown(0.123456789012), shown(None), shown(True), shown(64)) == ("0.123457", "-", "yes", "64")
    assert shown(["a.tar", "b.tar"]) == "a.tar, b.tar"


def test_wrong_folder_and_step(run_folder, tmp_path):
    for args, text in [
        (("list", tmp_path / "none"), "none: no such run folder"),
        (("verify", run_folder, "--step", 7), "checkpoints: no checkpoint of step 7; it has steps 100, 200"),
        (("show", run_folder, "--step", 7), "checkpoints: no checkpoint of step 7; it has steps 100, 200"),
    ]:
        error = invoke(*args).exception
        assert isinstance(error, RunError)
        assert text in str(error)


def test_verify_shows_progress(run_folder, monkeypatch, capfd):
    """Nothing while it is quick; a line with what is left where it takes long and the output is not a terminal."""
    from bifrost.data import progress
    from bifrost.trainer.checkpoint import store
    from bifrost.trainer.cli import checkpoint

    invoke("verify", run_folder)
    assert "verifying" not in capfd.readouterr().err
    hashed = store.file_problem

    def slowly(*args, **options):
        time.sleep(0.05)
        return hashed(*args, **options)

    monkeypatch.setattr(store, "file_problem", slowly)
    monkeypatch.setattr(checkpoint, "MB", 1)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.03)
    monkeypatch.setattr(progress.sys, "stderr", open(os.dup(2), "w"))  # noqa: SIM115
    assert not checkpoint._problems(store.Store(run_folder / "checkpoints"), 200)
    assert "verifying step-00000200: " in (said := capfd.readouterr().err) and " MB" in said
