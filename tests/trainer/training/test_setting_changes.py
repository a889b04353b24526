"""A continued run reports changed settings, and a finished one costs little."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.training.run_folder import check_run, placed, ranks_of
from bifrost.trainer.training.run_history import History
from bifrost.trainer.training.setting_changes import changes, check_unchanged, describe, finished
from bifrost.trainer.training.train import train

NOW = {"name": "a", "runs_dir": "there", "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "ema": {"decay": 0.99}}
EARLIER = {"name": "a", "runs_dir": "here", "optimizer": {"lr": 3e-5, "betas": [0.9, 0.95]}, "ema": None}


def test_each_changed_setting_is_named_with_both_values() -> None:
    found = changes(NOW, EARLIER)
    assert found == {"optimizer.lr": (3e-5, 0.1), "ema.decay": (None, 0.99)}
    assert describe(found) == "ema.decay null -> 0.99, optimizer.lr 3e-05 -> 0.1"
    assert changes(NOW, None) == changes(NOW, NOW) == {}


def test_a_setting_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    key = "flux.caption_exchange"
    before = load_recipe("tiny-controlnet").model_dump(mode="json")
    del before["flux"]["caption_exchange"]
    now = load_recipe("tiny-controlnet", [f"{key}=0"]).model_dump(mode="json")
    check_unchanged(now, before, [key], tmp_path)
    now = load_recipe("tiny-controlnet", [f"{key}=0.3"]).model_dump(mode="json")
    with pytest.raises(RunError, match=r"caption_exchange.*0\.0.*0\.3"):
        check_unchanged(now, before, [key], tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run of three steps leaves, as far as it is looked at."""
    recipe = load_recipe("tiny-mllm", ["steps=3", f"runs_dir={tmp_path}"])
    folder = tmp_path / "tiny-mllm"
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(
        json.dumps({"recipe": recipe.model_dump(mode="json"), "progress": {"step": 3}})
    )
    (checkpoint / "rank-00000.safetensors").write_bytes(b"12345")
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"rank-00000.safetensors": {"size": 5}}}))
    ended = {"time": 1.0, "event": "end", "step": 3, "outcome": "finished"}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 1.0}) + "\n" + json.dumps(ended) + "\n")
    (folder / "recipe.yaml").write_text("extends: tiny-mllm\nsteps: 3\n")
    (folder / "environment.json").write_text(json.dumps({"ranks": 2, "hosts": ["ranks 0-1 here"]}))
    return folder


def finished_steps(overrides: list[str]) -> int | None:
    recipe = load_recipe("tiny-mllm", overrides)
    return finished(Path(recipe.runs_dir) / recipe.name, recipe.model_dump(mode="json"))


def test_a_finished_run_is_known_by_its_small_files(run: Path) -> None:
    runs_dir = f"runs_dir={run.parent}"
    assert finished_steps(["steps=3", runs_dir]) == 3
    assert finished_steps(["steps=2", runs_dir]) == 3
    for override in ("steps=4", "seed=1", "name=other", "optimizer.lr=1"):
        assert finished_steps(["steps=3", runs_dir, override]) is None, override


@pytest.mark.parametrize("damage", ["locked", "cut", "unreadable", "stopped"])
def test_a_doubtful_one_is_looked_at_by_a_start(run: Path, damage: str) -> None:
    if damage == "locked":
        (run / "lock.json").touch()
    elif damage == "cut":
        (run / "checkpoints/step-00000003/rank-00000.safetensors").write_bytes(b"1234")
    elif damage == "unreadable":
        (run / "checkpoints/step-00000003/manifest.json").write_text("{")
    else:
        (run / "metrics.jsonl").write_text(json.dumps({"event": "end", "step": 3, "outcome": "stopped"}) + "\n")
    assert finished_steps(["steps=3", f"runs_dir={run.parent}"]) is None


def test_resume_of_a_finished_run_takes_no_torch(run: Path) -> None:
    command = (
        "import sys; from bifrost.trainer.cli import main; sys.argv = ['bifrost', 'resume', sys.argv[1]]; main.main()"
    )
    watched = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules))\n{command}"
    ended = subprocess.run([sys.executable, "-c", watched, str(run)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said, torch = ended.stdout.splitlines()
    assert said.startswith("tiny-mllm is finished: 3 steps in ") and "steps=6" in said and torch == "False"


def test_resume_takes_a_run_folder_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_run(run)
    for wrong, remedy in (
        (run / "checkpoints" / "step-00000003", f"is inside the run folder {run}"),
        (tmp_path / "nothing", "no such run folder"),
        (tmp_path, "not a run folder"),
    ):
        with pytest.raises(RunError, match=remedy):
            check_run(wrong)
    (tmp_path / "tiny-mllm-2" / "slurm").mkdir(parents=True)
    (tmp_path / "tiny-mllm-2" / "slurm" / "recipe.yaml").touch()
    with pytest.raises(RunError, match=rf"tiny-mlm-2: no such run folder; did you mean {tmp_path}/tiny-mllm-2\?"):
        check_run(tmp_path / "tiny-mlm-2")
    (tmp_path / "runs").mkdir()
    (tmp_path / "tiny-mllm-2").rename(tmp_path / "runs" / "cats")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"^cats: no such run folder; did you mean runs/cats\?"):
        check_run(Path("cats"))
    with pytest.raises(RunError, match="another name"):
        placed(run, ["steps=5", "name=other"])
    assert placed(Path("runs/a"), []) == ["runs_dir=runs", "name=a"]


def test_resume_has_as_many_ranks_as_the_run_had(run: Path) -> None:
    assert ranks_of(run) == 2
    (run / "environment.json").write_text(json.dumps({"ranks": 16, "hosts": ["ranks 0-7 a", "ranks 8-15 b"]}))
    with pytest.raises(RunError, match=r"2 nodes.*bifrost slurm resume"):
        ranks_of(run)


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["global_batch=8"], "global_batch was 32 in this run and is 8 now: set it back, or take another name"),
        (["ema.decay=0.5"], "ema.decay was 0.99 in this run and is 0.5 now"),
        (["ema=null"], 'ema was {"decay": 0.99} in this run and is null now'),
        (
            ["--ranks", "3"],
            "global_batch 32 does not divide by micro_batch x ranks, 16 x 3: set global_batch=33, or use 2 ranks",
        ),
    ],
)
def test_what_a_run_cannot_continue_with_is_refused_before_ranks_start(
    run: Path, words: list[str], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bifrost.trainer.cli.main import app

    monkeypatch.setattr("bifrost.trainer.cli.on_ranks.run_ranks", lambda *_: pytest.fail("ranks were started"))
    ended = CliRunner().invoke(app, ["resume", str(run), "steps=9", *words])
    assert isinstance(ended.exception, RunError) and refusal in str(ended.exception), ended.exception


@pytest.mark.parametrize("command", ["train", "plan", "resume"])
def test_a_folder_in_place_of_a_recipe_is_one_line(run: Path, command: str, capsys: pytest.CaptureFixture) -> None:
    from bifrost.recipes import RecipeError
    from bifrost.trainer.cli.main import app

    wrong = run / "checkpoints" if command == "resume" else run
    ended = CliRunner().invoke(app, [command, str(wrong)])
    assert isinstance(ended.exception, (RecipeError, RunError)), ended.output
    assert "bifrost resume" in str(ended.exception) or f"run folder {run}" in str(ended.exception)


def test_a_step_that_was_not_reached_is_refused_with_the_range() -> None:
    history = History.of(
        [
            {"event": "start", "step": 0, "batch": 0, "ranks": 1},
            {"step": 90, "batch": 90, "loss": 1.0},
            {"event": "rollback", "step": 95, "to": 50, "batch": 95},
            {"step": 60, "batch": 105},
            {"event": "end", "step": 63, "outcome": "stopped"},
        ]
    )
    assert history.step(95).batch == 95
    for step in (96, 999):
        with pytest.raises(RunError, match=f"step {step}: the run has reached step 95; give 1 to 95"):
            history.step(step)


def killed_before_a_save(recipe: list[str]) -> None:
    """An attempt that ends after a step, of which no checkpoint is left."""
    source, *overrides = recipe

    def die(progress: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    train(load_recipe(source, overrides), after_step=die)


def test_a_continued_run_says_what_has_changed(shards: Path, tmp_path: Path) -> None:
    small = runs.arguments(shards, tmp_path, "steps=1", "data.image_size=112")
    assert ranked.bifrost(1, *small)[0].code == 0
    run = tmp_path / "tiny-mllm"
    unsaved = ranked.run(killed_before_a_save, 1, [*small[1:], "steps=4", "optimizer.lr=0.5"])[0]
    assert unsaved.code == -signal.SIGKILL, unsaved.err
    assert "optimizer.lr 0.001 -> 0.5" in unsaved.out and load_recipe(run / "recipe.yaml").optimizer.lr == 0.5
    changed = ["steps=2", "optimizer.lr=0.1"]
    ended = ranked.bifrost(1, "resume", str(run), *changed)[0]
    assert ended.code == 0, ended.err
    assert "settings changed since the checkpoint: optimizer.lr 0.001 -> 0.1, steps 1 -> 2\n" in ended.out
    *_, event = runs.events(run, "settings_changed")
    assert event["step"] == 1 and event["changes"] == {"optimizer.lr": [0.001, 0.1], "steps": [1, 2]}

    other = ["train", "tiny-controlnet", *small[2:], "name=tiny-mllm"]
    ended = ranked.bifrost(1, *other)[0]
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "the run tiny-mllm is of stage patch-latents, this recipe of stage controlnet" in ended.err


def test_a_setting_that_an_older_version_did_not_know_has_not_changed() -> None:
    """A checkpoint holds the settings that there were when it was written."""
    now = load_recipe("tiny-mllm").model_dump(mode="json")
    before = json.loads(json.dumps(now))
    del before["kernels"]["deterministic"]
    assert changes(now, before) == {}
    now["kernels"]["deterministic"] = True
    assert describe(changes(now, before)) == "kernels.deterministic false -> true"
