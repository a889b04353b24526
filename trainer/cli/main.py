"""The `bifrost` command: thin, one function a verb; groups are mounted from the folders that own them."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...data import DataError
from ...data.cli import app as data_app
from ...data.progress import progress
from ...recipes import Recipe, RecipeError, load_recipe, to_yaml
from ...recipes.secrets import redact
from ...slurm import SlurmError, rank_environment
from ...slurm.cli import slurm_app
from ...slurm.exit_codes import DONE, FAILED, HUNG, LOCKED, LOST, USAGE
from ...slurm.exit_record import record_outcome
from ...slurm.rank_env import idle_nodes, remove_private_folders
from ..distributed.launcher import adopt_rank, devices, lost_file, run_child, run_ranks
from ..distributed.stop_signals import PHASE_FILE, ignore_signals
from ..errors import Locked, RendezvousTimeout, RunError, Unhealthy, foreseen, lost_rank, with_message
from ..training.batch import batch_arithmetic
from ..training.run_folder import check_run, placed, ranks_of
from ..training.setting_changes import finished
from ..versions import BIFROST, how_to_install, require
from .bench import app as bench_app
from .checkpoint import app as checkpoint_app
from .doctor import doctor
from .evaluate import evaluate
from .examples import add_examples
from .generate import generate
from .goodput import goodput
from .init import init
from .options import Overrides, RanksOption, RecipeArgument
from .plan import plan
from .replay import replay
from .report import compare, report
from .runs import runs
from .track import app as track_app

app = typer.Typer(
    help="Training system for Bifrost-1.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data", help="Shards: make, check, count.")
app.add_typer(checkpoint_app, name="checkpoint", help="Checkpoints of a run: list, verify, show.")
app.add_typer(bench_app, name="bench", help="Measure a recipe on this machine.")
app.add_typer(track_app, name="track", help="MLflow: send what a tracker missed.")

app.add_typer(slurm_app, name="slurm")

app.command()(init)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(goodput)
app.command()(runs)
app.command()(report)
app.command()(compare)
app.command()(replay)
app.command()(doctor)

RANKED = [["train"], ["resume"], ["generate"], ["data", "encode"], ["kernels", "profile"], ["bench", "scale"]]
"""Commands that launchers start as the ranks of a run."""


RENAMED_OPTIONS = {"--rival": "--baseline"}
"""Old name -> what it is refused with."""


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


kernels_app = typer.Typer(no_args_is_help=True)
app.add_typer(kernels_app, name="kernels", help="Triton kernels: compile, check, time.")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
) -> None:
    """Train a recipe, or go on from its newest checkpoint."""
    settings = load_recipe(recipe, overrides or [])
    if dry_run:
        _show(settings, ranks)
        return

    _on_ranks(settings, ranks, ["train", recipe, *(overrides or [])], _train, trains=True)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/mllm-7b.")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Processes; default as many as the run had.", min=1)] = None,
) -> None:
    """Continue a run from its newest checkpoint, with the settings that it has, or with some of them changed."""
    check_run(run)
    given = overrides or []
    settings = load_recipe(run / "recipe.yaml", [*given, *placed(run, given)], stored=True)
    arguments = ["resume", str(run), *given]
    _on_ranks(settings, ranks, arguments, _train, trains=True, usual=lambda: ranks_of(run) or devices())


@data_app.command("encode")
def data_encode(recipe: RecipeArgument, overrides: Overrides = None, ranks: RanksOption = None) -> None:
    """Store what the frozen parts compute that the recipe wants cached (flux.placement), beside the shards."""
    settings = load_recipe(recipe, overrides or [])
    adopted = adopt_rank(ranks)
    ranks = ranks or devices()
    if adopted or ranks == 1:
        from ..stages.precompute import encode

        _leave(encode(settings))
    _leave(run_ranks(ranks, ["data", "encode", recipe, *(overrides or [])]))


@kernels_app.command("check")
def kernels_check() -> None:
    """Compile every kernel for sm_80, sm_90 and sm_100, without a GPU; exit code 1 when one spills or does not fit."""
    require("triton")
    # A process of its own: on a machine without a GPU this one has Triton's interpreter.
    _leave(run_child("bifrost.kernels.compile_check", counts="kernels"))


@kernels_app.command("profile")
def kernels_profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Profiled steps, after two others.", min=1)] = 3,
    ranks: RanksOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the trace and the table.")] = Path("profile"),
) -> None:
    """Train a few steps of a recipe under torch.profiler: time by kind of work, and a trace for Perfetto."""
    settings = load_recipe(recipe, overrides or [])
    arguments = ["kernels", "profile", recipe, *(overrides or []), f"--steps={steps}", f"--out={out}"]

    def profiled(recipe: Recipe) -> int:
        from ..bench.profile import profile_steps

        return profile_steps(recipe, steps, out)

    _on_ranks(settings, ranks, arguments, profiled)


@kernels_app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def kernels_bench(context: typer.Context) -> None:
    """Time the kernels against PyTorch and a floor measured in the same run; --help lists the options."""
    require("triton")
    # A process of its own: this one has Triton's interpreter on a machine without a GPU, and much else in its memory.
    _leave(run_child("bifrost.kernels.bench", *context.args))


class Layout(str, Enum):
    public = "public"
    hf = "hf"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[
        Layout, typer.Option("--format", help="public: the release's layout with the base; hf: the trained part.")
    ] = Layout.public,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights.")] = False,
    step: Annotated[int | None, typer.Option(help="A step other than the newest.")] = None,
) -> None:
    """Write a run's trained weights as safetensors in bf16."""
    from ..checkpoint.export import export as write

    with progress("exporting"):
        taken = write(run, out, layout.value, ema=ema, step=step)
    print(f"{out}: step {taken} of {run} in the {layout.value} layout")


def _on_ranks(
    recipe: Recipe,
    ranks: int | None,
    arguments: list[str],
    work: Callable[[Recipe], int],
    trains: bool = False,
    usual: Callable[[], int] = devices,
) -> NoReturn:
    """Do `work` as the rank that this process is, or run `arguments` as `ranks` processes that will be, or `usual()`
    where no number is given. trains: whether ranks save when they are stopped."""
    if adopt_rank(ranks):
        code = work(recipe)
        ignore_signals()
        if code == DONE:
            remove_private_folders(os.environ)
        _leave(code)
    if ranks is None and (idle := idle_nodes(os.environ)):
        raise RunError(
            f"this Slurm job has {idle + 1} nodes, and bifrost was started on one of them alone: put `srun"
            " --ntasks-per-node=N` before it (N: GPUs per node), or give --ranks to use this machine alone"
        )
    run = Path(recipe.runs_dir) / recipe.name
    if trains and (steps := finished(recipe)):
        print(f"{recipe.name} is finished: {steps} steps in {run}; more steps continue it, such as steps={2 * steps}")
        _leave(DONE)
    ranks = ranks or usual()
    batch_arithmetic(recipe, ranks)
    _leave(run_ranks(ranks, arguments, run if trains else None))


def _train(recipe: Recipe) -> int:
    from ..training.train import train as train_rank

    return train_rank(recipe)


def _show(recipe: Recipe, ranks: int | None) -> None:
    import torch

    from ..optim.engine import deepspeed_config
    from ..stages import open_stage
    from ..training.inputs import require_places

    ranks = ranks or devices()
    passes = batch_arithmetic(recipe, ranks)
    with torch.device("meta"):
        model = open_stage(recipe, for_counting=True).build()
    require_places(recipe)
    trainable = sum(p.numel() for p in model.trainable().values())
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    print(to_yaml(recipe))
    print("# DeepSpeed")
    print(json.dumps(deepspeed_config(recipe, ranks), indent=2))
    print(f"trainable parameters  {trainable:>16,}")
    print(f"frozen parameters     {frozen:>16,}")
    print(
        f"global batch {recipe.global_batch} = {ranks} ranks x micro batch {recipe.micro_batch}"
        f" x {passes} backward passes; {recipe.steps} steps = {recipe.steps * recipe.global_batch:,} samples"
    )


def _leave(code: int) -> NoReturn:
    raise typer.Exit(code)


add_examples(app)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, a run that cannot go on exit code 1."""
    try:
        code = app([_with_home(word) for word in sys.argv[1:]], standalone_mode=False)
    except (RecipeError, DataError, RunError, SlurmError) as error:
        passing = getattr(error, "passing", False)
        _fail(error, LOCKED if isinstance(error, Locked) else LOST if passing else USAGE)
    except Unhealthy as error:
        _fail(error, FAILED)
    except ModuleNotFoundError as error:
        if (line := how_to_install(error)) is None:
            raise
        _fail(RunError(line), USAGE)
    except RendezvousTimeout as error:
        _fail(error, HUNG)
    except Exception as error:
        if hasattr(error, "format_message"):  # of a wrong command line: typer may bring a click of its own
            _refuse(error)
        if (found := foreseen(error)) is None:
            if (line := lost_rank(error)) is None or (rank := _rank()) is None:
                raise
            _leave_lost(error, rank, line)
        logging.getLogger(__name__).debug("%s", found, exc_info=error)
        if (rank := _rank()) is not None:  # it came on this rank alone: the others do not say it
            found = with_message(found, f"rank {rank}: {found}")
        _fail(found, LOST if getattr(found, "passing", False) else USAGE)
    sys.exit(code if isinstance(code, int) else DONE)


def _with_home(word: str) -> str:
    """`--out=~/x` as the shell would have handed over `--out ~/x`, instead of a folder that is called `~`."""
    option, separator, value = word.partition("=~")
    if not separator or not option.startswith("--"):
        return word
    return f"{option}={os.path.expanduser(f'~{value}')}"


def _refuse(error: Any) -> NoReturn:
    """Say in one line what is wrong with the command line; a command without its words gets its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(USAGE)
    old = getattr(error, "option_name", "")
    if type(error).__name__ == "NoSuchOption" and old in RENAMED_OPTIONS:
        _fail(RunError(f"{old} is now {RENAMED_OPTIONS[old]}; write that instead"), USAGE)
    text = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
    usage = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
    _fail(RunError(f"{text[:1].lower()}{text[1:]}{usage}"), USAGE)


def _rank() -> int | None:
    """Which of several ranks this process is; None for one that is alone, whatever an earlier launcher has left in its
    environment: its errors are said by nobody else."""
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
    """End a rank that lost another one: the traceback goes to its log, or is reduced to its place before there is one.
    No outcome is recorded: the cause is the other rank's."""
    logging.getLogger(__name__).info("%s", line, exc_info=error)
    logs = [each.baseFilename for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]
    last = [
        frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(__file__).parent) in frame.filename
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
    # What all ranks raise alike is said once; a loss on one rank alone names it.
    rank, text = _rank(), redact(str(error))
    if rank in (None, 0) or text.startswith(f"rank {rank}:"):
        print(f"error: {text}", file=sys.stderr, flush=True)
    record_outcome(code, text)
    # Threads of the process group would keep a failed rank alive.
    os._exit(code)
