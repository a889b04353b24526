"""The `bifrost` command: thin, one function per verb; groups are mounted from the folders that own them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...data import DataError
from ...data.cli import app as data_app
from ...recipes import RecipeError
from ...recipes.secrets import redact
from ...slurm import SlurmError, rank_environment
from ...slurm.cli import slurm_app
from ...slurm.exit_codes import DONE, FAILED, HUNG, LOCKED, LOST, USAGE
from ...slurm.exit_record import record_outcome
from ...slurm.manifests.cli import manifest
from ..distributed.launcher import lost_file
from ..distributed.stop_signals import PHASE_FILE
from ..errors import Locked, RendezvousTimeout, RunError, Unhealthy, foreseen, lost_rank, with_message
from ..versions import BIFROST, how_to_install
from .ablate import ablate
from .bench import app as bench_app
from .checkpoint import app as checkpoint_app
from .doctor import doctor
from .evaluate import evaluate
from .examples import add_examples
from .generate import generate
from .goodput import goodput
from .hub import app as hub_app
from .init import init
from .kernels import app as kernels_app
from .plan import plan
from .replay import replay
from .report import compare, report
from .runs import runs
from .score import score
from .shards import index, verify
from .track import app as track_app
from .train import encode, export, resume, train
from .train_node import train_node

app = typer.Typer(
    help="Training system for Bifrost-1.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data", help="Shards: make, check, count.")
app.add_typer(checkpoint_app, name="checkpoint", help="Checkpoints of a run: list, verify, show.")
app.add_typer(bench_app, name="bench", help="Measure a recipe on this machine.")
app.add_typer(hub_app, name="hub", help="Exported folders on a model hub: push, pull.")
app.add_typer(track_app, name="track", help="Trackers: send what they lack of a run.")

app.add_typer(slurm_app, name="slurm")

app.command()(init)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(score)
app.command()(ablate)
app.command()(plan)
app.command()(goodput)
app.command()(runs)
app.command()(report)
app.command()(compare)
app.command()(replay)
app.command()(doctor)
app.command()(manifest)

RANKED = [
    *(["train"], ["resume"], ["generate"], ["eval"], ["kernels", "profile"], ["bench", "scale"]),
    *(["bench", "checkpoint"], ["data", "encode"], ["data", "index"], ["data", "verify"]),
]
"""Commands that launchers start as ranks."""


RENAMED_OPTIONS = {"--rival": "--baseline"}
"""Old name -> new name, for the error message."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bifrost {BIFROST}")
        raise typer.Exit


@app.callback()
def bifrost(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.add_typer(kernels_app, name="kernels", help="Triton kernels: compile, check, time.")
app.command()(train)
app.command(hidden=True)(train_node)
app.command()(resume)
app.command()(export)
data_app.command()(index)
data_app.command()(verify)
data_app.command("encode")(encode)
add_examples(app)


def main() -> None:
    """Run the command. A user's mistake is one line on stderr with exit code 2; a failed run has exit code 1."""
    try:
        code = app([_with_home(word) for word in sys.argv[1:]], standalone_mode=False)
    except (RecipeError, DataError, RunError, SlurmError) as error:
        transient = getattr(error, "transient", False)
        _fail(error, LOCKED if isinstance(error, Locked) else LOST if transient else USAGE)
    except Unhealthy as error:
        _fail(error, FAILED)
    except ModuleNotFoundError as error:
        if (line := how_to_install(error)) is None:
            raise
        _fail(RunError(line), USAGE)
    except RendezvousTimeout as error:
        _fail(error, HUNG)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error: typer may bundle its own click
            _refuse(error)
        if (found := foreseen(error)) is None:
            if (line := lost_rank(error)) is None or (rank := _rank()) is None:
                raise
            _leave_lost(error, rank, line)
        logging.getLogger(__name__).debug("%s", found, exc_info=error)
        if (rank := _rank()) is not None:  # raised only on this rank: the others do not report it
            found = with_message(found, f"rank {rank}: {found}")
        _fail(found, LOST if getattr(found, "transient", False) else USAGE)
    sys.exit(code if isinstance(code, int) else DONE)


def _with_home(word: str) -> str:
    """`--out=~/x` with the home folder expanded, as the shell does for `--out ~/x`, instead of a folder called `~`."""
    option, separator, value = word.partition("=~")
    if not separator or not option.startswith("--"):
        return word
    return f"{option}={os.path.expanduser(f'~{value}')}"


def _refuse(error: Any) -> NoReturn:
    """Print a usage error in one line; a command without arguments prints its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(USAGE)
    old = getattr(error, "option_name", "")
    if type(error).__name__ == "NoSuchOption" and old in RENAMED_OPTIONS:
        _fail(RunError(f"{old} is now {RENAMED_OPTIONS[old]}; write that instead"), USAGE)
    if type(error).__name__ == "NoSuchOption" and (line := _as_setting(error)):
        _fail(RunError(line), USAGE)
    text = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
    if "unexpected extra argument" in text:
        text += _paths_hint(text)
    usage = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
    _fail(RunError(f"{text[:1].lower()}{text[1:]}{usage}"), USAGE)


def _paths_hint(text: str) -> str:
    """The remedy for the unexpected arguments in the message `text` if the shell made them from a wildcard."""
    extra = [Path(word) for word in sys.argv[1:] if word in text and os.path.exists(word)]
    if shard := next((path for path in extra if path.suffix == ".tar"), None):
        return f": put wildcards in quotes, such as '{shard.parent / '*.tar'}'"
    return ": give one folder, not each path in it" if extra else ""


def _as_setting(error: Any) -> str | None:
    """The error of an unknown option that is the name of a setting, of a command with settings; None for others, and
    for the beginning of an option."""
    from ...recipes import Recipe
    from ...recipes.known_keys import keys_named

    option = error.option_name
    keys = keys_named(option.lstrip("-").replace("-", "_"), Recipe)
    if not keys or error.ctx is None or all(each.name != "overrides" for each in error.ctx.command.params):
        return None
    if any(name.startswith(option) for name in error.possibilities or ()):
        return None
    words = [*sys.argv[1:], "VALUE"]
    given = next((word for word in words if word.startswith(f"{option}=")), None)
    value = given.partition("=")[2] if given else words[words.index(option) + 1] if option in words else "VALUE"
    if value.startswith("-") or "=" in value:
        value = "VALUE"
    return f"{option} is a setting, not an option: write {' or '.join(f'{key}={value}' for key in keys[:3])}"


def _rank() -> int | None:
    """The rank of this process; None for a single process, even if an earlier launcher left its variables."""
    words = sys.argv[1:]
    ranked = any(words[: len(verb)] == verb for verb in RANKED)
    if not ranked or "RANK" not in os.environ or any(word.startswith("--ranks") for word in words):
        return None
    try:
        found = rank_environment(os.environ)
    except SlurmError:
        return None
    return int(found["RANK"]) if found and found["WORLD_SIZE"] != "1" else None


def _leave_lost(error: Exception, rank: int, line: str) -> NoReturn:
    """End a rank that lost a peer. The traceback goes to its log; without a log, only its last frame is printed.
    No outcome is recorded: the cause is on the other rank."""
    logging.getLogger(__name__).info("%s", line, exc_info=error)
    logs = [each.baseFilename for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]
    last = [
        frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(__file__).parents[1]) in frame.filename
    ]
    place = f"traceback in {logs[0]}" if logs else f"raised in {last[-1].filename}:{last[-1].lineno}"
    text = redact(f"error: rank {rank}: {line}; {place}")
    # The launcher knows which rank ended first, and prints one line for all of them.
    if phase_file := os.environ.get(PHASE_FILE):
        lost_file(Path(phase_file), rank).write_text(text)
    else:
        print(text, file=sys.stderr, flush=True)
    os._exit(FAILED)


def _fail(error: Exception, code: int) -> NoReturn:
    # An error that all ranks raise is printed once; one of a single rank names the rank.
    rank, text = _rank(), redact(str(error))
    if rank in (None, 0) or text.startswith(f"rank {rank}:"):
        print(f"error: {text}", file=sys.stderr, flush=True)
    record_outcome(code, text)
    # Threads of the process group would keep a failed rank alive.
    os._exit(code)
