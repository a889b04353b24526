"""A wrong command line: one line that names the fault and where to read on, exit code 2."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.slurm import SlurmError
from bifrost.slurm.rank_env import LAUNCHER_VARIABLES
from bifrost.trainer.cli import main
from bifrost.trainer.cli.main import app

MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class Left(Exception):
    """Stands for `os._exit`, which would end the tests."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "error: missing argument 'recipe'; see `bifrost train --help`"),
        ("trian tiny-mllm", "error: no such command 'trian'. Did you mean 'train', 'track'?; see `bifrost --help`"),
        (
            "train tiny-mllm --rank 2",
            "error: no such option: --rank (Possible options: --ranks); see `bifrost train --help`",
        ),
        ("train tiny-mllm --steps 20", "error: --steps is a setting, not an option: write steps=20\n"),
        ("train tiny-mllm --lr=1e-3", "error: --lr is a setting, not an option: write optimizer.lr=1e-3\n"),
        ("plan tiny-mllm --micro-batch", "error: --micro-batch is a setting, not an option: write micro_batch=VALUE\n"),
        ("replay RUN --lr 20", "error: no such option: --lr"),  # has no settings
        (
            "eval --mllm a --controlnet b --out c --data SHARD SHARD SHARD",
            "error: got unexpected extra argument(s) (SHARD SHARD): put wildcards in quotes, such as 'FOLDER/*.tar'",
        ),
        (
            "init cats --data x SHARD",
            "error: got unexpected extra argument(s) (SHARD): put wildcards in quotes, such as",
        ),
        ("init cats dogs", "error: got unexpected extra argument(s) (dogs); see `bifrost init --help`"),
        (
            "data ingest SHARD FILE FILE",
            "error: got unexpected extra argument(s) (FILE): give one folder, not each path",
        ),
        ("train tiny-mllm --ranks 0", "error: invalid value for '--ranks': "),
        (
            "generate --layout x",
            "error: invalid value for '--layout': 'x' is not one of 'plain', 'geneval', 'dpg'; see",
        ),
        (
            "bench scale tiny-mllm --mode x",
            "error: invalid value for '--mode': 'x' is not one of 'weak', 'strong'; see",
        ),
        ("plan tiny-mllm --gpus", "error: option '--gpus' requires an argument"),
        (
            "init my/cats --from tiny-mllm",
            "error: 'my/cats' is not a valid run name, which is also a folder name; use letters",
        ),
        ("replay FILE --step 1", "error: FILE: not a run folder, it has no metrics.jsonl"),
        ("track sync FILE", "error: FILE/recipe.yaml: Not a directory"),
        ("slurm status FILE", "error: FILE/slurm/job.json: Not a directory"),
        ("checkpoint show FILE", "error: FILE: not a run folder, it has no recipe.yaml"),
        ("report FILE", "error: FILE: not a run folder, it has no recipe.yaml"),
        ("export FILE out", "error: FILE: not a run folder, it has no recipe.yaml"),
        ("init cats", "error: choose a recipe to start from, such as --from tiny-mllm; available: flux-controlnet"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """FILE stands for a file where a folder is wanted, SHARD for a shard, FOLDER for its folder."""
    codes = []
    file, shard = tmp_path / "file", tmp_path / "a.tar"
    for name, path in (("FILE", file), ("SHARD", shard), ("FOLDER", tmp_path)):
        words, said = words.replace(name, str(path)), said.replace(name, str(path))
    file.touch()
    shard.touch()

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(main.os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["bifrost", *words.split()])
    with pytest.raises(Left):
        main.main()
    out, err = capsys.readouterr()
    assert codes == [2] and out == "" and err.count("\n") == 1 and err.startswith(said)


@pytest.mark.parametrize(
    ("words", "left_over", "said"),
    [
        ("runs nowhere", {"RANK": "3"}, "nowhere: no such folder"),
        ("runs nowhere", {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", **MET}, "nowhere: no such folder"),
        ("train nowhere", {"RANK": "3", "WORLD_SIZE": "8"}, "nowhere: no such recipe"),
        ("train nowhere --ranks 2", {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", **MET}, "nowhere: no such"),
        ("train tiny-mllm", {"RANK": "3", "WORLD_SIZE": "8"}, "RANK=3 and WORLD_SIZE=8 are set without LOCAL_RANK"),
        ("train tiny-mllm", {"RANK": "x", "WORLD_SIZE": "8"}, "RANK=x: want a number"),
        ("train nowhere", {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", **MET}, None),
    ],
)
def test_only_one_of_several_ranks_leaves_the_line_to_another(
    words: str, left_over: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What an earlier launcher has left in a shell makes no command end without a word."""
    monkeypatch.setattr(main.os, "_exit", lambda code: sys.exit(code))
    monkeypatch.setattr(sys, "argv", ["bifrost", *words.split()])
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        main.main()
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert printed.startswith(f"error: {said}") if said else not printed


def test_the_home_folder_in_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells expand `--out ~/x`, not `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bifrost", "init", "cats", "--from", "tiny-mllm", "--out=~/made/cats.yaml"])
    (tmp_path / "home" / "made").mkdir(parents=True)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 0
    assert (tmp_path / "home" / "made" / "cats.yaml").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(("words", "code"), [("", 2), ("data", 2), ("--help", 0), ("train --help", 0)])
def test_a_command_without_its_words_prints_its_help(
    words: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bifrost", *words.split()])
    with pytest.raises(SystemExit) as left:
        main.main()
    printed = "".join(capsys.readouterr())
    assert left.value.code == code and printed.count("Usage:") == 1 and "--help" in printed


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("backbone.path", "backbone.path={0}"),
        ("init_from", "init_from={0}"),
        ("previews.controlnet", "previews.every=5 previews.controlnet={0}"),
        ("previews.flux", "previews.every=5 previews.controlnet={1} previews.flux={0}"),
    ],
)
def test_what_comes_before_a_run_names_a_folder_that_is_missing(tmp_path: Path, setting: str, named: str) -> None:
    gone = tmp_path / "gone"
    overrides = named.format(gone, tmp_path).split()
    ended = CliRunner().invoke(app, ["train", "tiny-mllm", "--dry-run", f"runs_dir={tmp_path}", *overrides])
    assert str(ended.exception).startswith(f"{setting}={gone}: no such "), ended.output
    if setting in ("init_from", "previews.controlnet"):
        for words in (["plan", "tiny-mllm", "--gpus", "8"], ["slurm", "submit", "tiny-mllm"]):
            other = CliRunner().invoke(app, [*words, f"runs_dir={tmp_path}", "micro_batch=4", *overrides])
            assert str(other.exception) == str(ended.exception), words
    if setting == "init_from":  # a run that continues has read it
        (tmp_path / "tiny-mllm" / "checkpoints" / "step-00000001").mkdir(parents=True)
        ended = CliRunner().invoke(app, ["train", "tiny-mllm", "--dry-run", f"runs_dir={tmp_path}", *overrides])
        assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize("key", ["data.shards", "validation.shards"])
@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ("GONE/*.tar", "GONE/*.tar: no .tar matches"),
        ("GONE/train-{0..3}.tar", "GONE/train-0.tar: "),
        ("[s3://bucket/a.tar, GONE/b.tar]", "GONE/b.tar: "),
    ],
)
def test_submit_warns_of_shards_that_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, shards: str, said: str
) -> None:
    """They may be on the nodes' own disks."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm's commands
    shards, said = shards.replace("GONE", f"{tmp_path}/gone"), said.replace("GONE", f"{tmp_path}/gone")
    others = [] if key == "data.shards" else ["data.shards=s3://bucket/a.tar"]
    words = [f"runs_dir={tmp_path}", *others, f"{key}={shards}", "--gpus-per-node", "2"]
    ended = CliRunner().invoke(app, ["slurm", "submit", "tiny-mllm", *words])
    assert f"warning: {said}" in ended.output and "preflight checks it there" in ended.output, ended.output
    assert isinstance(ended.exception, SlurmError) and not any(tmp_path.iterdir())


def test_init_refuses_a_recipe_whose_weights_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("extends: tiny-mllm\nname: base\ninit_from: gone\n")
    ended = CliRunner().invoke(app, ["init", "cats", "--from", "base.yaml"])
    assert str(ended.exception) == "init_from=gone: no such file or folder" and not (tmp_path / "cats.yaml").exists()
