"""The `bifrost` command itself: its help, version and completion, however it is called."""

import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from bifrost.kernels.bench.arguments import read_arguments
from bifrost.recipes import load_recipe
from bifrost.trainer.cli.examples import EXAMPLES
from bifrost.trainer.cli.main import app

ROOT = typer.main.get_command(app)


def walk(command: click.Command = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


VERBS = {" ".join(path): verb for path, verb in walk() if not hasattr(verb, "commands") and not verb.hidden}


@functools.cache
def shown(*path: str) -> str:
    """What `-h` prints, without its spaces: a narrow terminal folds lines."""
    ended = CliRunner().invoke(app, [*path, "-h"])
    assert ended.exit_code == 0 and "Usage" in ended.output, path
    return re.sub(r"\s+", "", ended.output)


def test_h_is_help_everywhere() -> None:
    for path, _ in walk():
        if path != ("kernels", "bench"):  # a process of its own reads its arguments
            assert "--help-h" in shown(*path), path
    long = CliRunner().invoke(app, ["data", "verify", "--help"])
    assert long.exit_code == 0 and re.sub(r"\s+", "", long.output) == shown("data", "verify")


def test_kernels_bench_has_h_too() -> None:
    with pytest.raises(SystemExit) as ended:
        read_arguments(["-h"], torch.device("cpu"))
    assert ended.value.code == 0


def test_every_command_has_an_example_in_its_help_which_parses() -> None:
    for name, verb in VERBS.items():
        assert EXAMPLES.get(name), f"{name}: give it an example in trainer/cli/examples.py"
        for example in EXAMPLES[name]:
            words = shlex.split(example)
            words = words[words.index("bifrost") + 1 :]
            assert words[: len(name.split())] == name.split(), example
            if name == "kernels bench":
                continue
            assert re.sub(r"\s+", "", example) in shown(*name.split()), example
            given = verb.make_context(name, words[len(name.split()) :]).params  # raises for what it would refuse
            if recipe := given.get("recipe") or (name == "init" and given["source"]):
                load_recipe(str(recipe), given.get("overrides") or [])


@pytest.mark.parametrize("module", ["bifrost", "bifrost.trainer"])
def test_version_of_the_module(module: str, tmp_path: Path) -> None:
    """Also if the working directory, which old Pythons search first, has folders with our packages' names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('the wrong folder')")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, "-m", module, "--version"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, f"bifrost {importlib.metadata.version('bifrost-train')}\n")


@pytest.mark.parametrize(("words", "offered"), [("bifrost tra", ["train", "track"]), ("bifrost slurm ca", ["cancel"])])
def test_completion_by_the_shell(words: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    shown = CliRunner().invoke(app, [], prog_name="bifrost", env={"_BIFROST_COMPLETE": "complete_bash"})
    assert sorted(shown.output.split()) == sorted(offered)
