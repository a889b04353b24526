"""A run that hangs ends within its bound, with all ranks' stacks, and names the rank that the others wait for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.recipes.schema import Watchdog as Settings
from bifrost.slurm.exit_codes import HUNG
from bifrost.trainer.monitors.phase_timer import PhaseTimer
from bifrost.trainer.monitors.stacks import RankStatus, suspect_rank
from bifrost.trainer.monitors.watchdog import FLOOR_S, Watchdog

BOUND = 8.0
ASLEEP = re.compile(r"\(most recent call first\):\n  File .* in hanging\n")


def hang(arguments: list[str], where: str, how: str, rank: int) -> None:
    """Train while `rank` hangs in its third step: asleep, or with the interpreter blocked as a whole."""
    import ctypes
    import os

    from bifrost.data import Loader
    from bifrost.trainer.optim import engine
    from bifrost.trainer.training import build

    calls = 0

    def before(function):
        def hanging(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3 and os.environ["RANK"] == str(rank):
                if how == "asleep":
                    time.sleep(1000)
                ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock
            return function(*args, **kwargs)

        return hanging

    if where == "data":
        read = Loader.__iter__

        def iterate(self):
            batches = read(self)
            step = before(lambda: next(batches))
            while True:
                yield step()

        Loader.__iter__ = iterate
    elif where == "forward":
        # Inside the forward pass, behind the gathers of its first weights: all ranks are in the same section.
        from bifrost.trainer.models import branch

        branch.GenerationBranch.forward = before(branch.GenerationBranch.forward)
    elif where == "optimizer":
        engine.Engine.step = before(engine.Engine.step)
    else:  # a save, with checkpoint.every=1
        build.capture = before(build.capture)
    ranked.command(arguments)


def hung(shards: Path, tmp_path: Path, *case: object, ranks: int = 2, settings: tuple[str, ...] = ()) -> tuple:
    """The exit codes, the event, the folder of stacks and what was printed."""
    bounds = (f"watchdog.step_timeout_s={BOUND}", "watchdog.save_timeout_s=12", "micro_batch=4")
    arguments = runs.arguments(shards, tmp_path, "steps=9", *bounds, *settings)
    ended = ranked.run(hang, ranks, arguments, *case)
    run = tmp_path / "tiny-mllm"
    (event,) = runs.events(run, "hang")
    return [rank.code for rank in ended], event, run / event["stacks"], "".join(rank.err for rank in ended)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(("where", "rank"), [("data", 1), ("forward", 0), ("optimizer", 1)])
def test_a_rank_asleep_is_named_and_all_stacks_are_written(shards: Path, tmp_path: Path, where: str, rank: int) -> None:
    codes, event, stacks, printed = hung(shards, tmp_path, where, "asleep", rank)
    assert codes == [HUNG] * 2
    assert (event["rank"], event["phase"], event["step"]) == (rank, where, 2)
    assert BOUND < event["stalled_s"] < BOUND + 30 and event["timeout_s"] == BOUND
    assert printed.count("error: ") == 1 and f"rank {rank} on " in printed and f"in {where} of step 3" in printed
    for other in range(2):
        assert bool(ASLEEP.search((stacks / f"rank-{other:05d}.txt").read_text())) == (other == rank)
        assert json.loads((stacks / f"rank-{other:05d}.json").read_text())["rank"] == other
        assert "gloo:" in (stacks / f"rank-{other:05d}.collectives.json").read_text()
    assert "gloo:" in event["collective"] and json.loads((stacks / "report.json").read_text())["rank"] == rank


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_whose_interpreter_is_blocked_leaves_its_stack_too(shards: Path, tmp_path: Path) -> None:
    codes, event, stacks, printed = hung(shards, tmp_path, "optimizer", "blocked", 0)
    assert codes == [HUNG] * 2
    assert event["rank"] == 0 and "rank 0 on " in printed and "does not answer" in printed
    assert ASLEEP.search((stacks / "rank-00000.txt").read_text())
    assert not (stacks / "rank-00000.json").exists()


@pytest.mark.multi
@pytest.mark.slow
def test_a_save_has_a_bound_of_its_own(shards: Path, tmp_path: Path) -> None:
    codes, event, _, _ = hung(shards, tmp_path, "save", "asleep", 1, settings=("checkpoint.every=1",))
    assert codes == [HUNG] * 2
    assert (event["rank"], event["phase"], event["timeout_s"]) == (1, "save", 12)


@pytest.mark.multi
@pytest.mark.slow
def test_a_stopped_rank_and_its_launcher(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=4000", f"watchdog.step_timeout_s={BOUND}", "--ranks", "2")
    with runs.launched(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        run = tmp_path / "tiny-mllm"
        runs.wait_for_steps(run, 2)
        first, second = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(second), signal.SIGSTOP)
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == HUNG
        assert "rank 1 on " in err and "does not answer" in err
        assert not any(Path(f"/proc/{pid}").exists() for pid in (first, second))


def test_before_the_ranks_have_met(tmp_path: Path) -> None:
    """A rank whose peers never come: its stack goes to stderr."""
    script = (
        "import time; from bifrost.recipes.schema import Watchdog as Settings;"
        "from bifrost.trainer.monitors.phase_timer import PhaseTimer;"
        "from bifrost.trainer.monitors.watchdog import Watchdog;"
        "watchdog = Watchdog(Settings(startup_timeout_s=0.5), PhaseTimer()).__enter__(); time.sleep(100)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == HUNG
    assert "before the rendezvous" in ended.stderr and 'File "<string>", line 1' in ended.stderr
    assert not any(tmp_path.iterdir())


def test_a_run_that_goes_well_leaves_no_stacks(shards: Path, tmp_path: Path) -> None:
    ended = ranked.bifrost(1, *runs.arguments(shards, tmp_path, "steps=2"))
    assert ended[0].code == 0, ended[0].err
    assert not (tmp_path / "tiny-mllm" / "stacks").exists()


def test_bounds() -> None:
    phases = PhaseTimer()
    watchdog = Watchdog(Settings(startup_timeout_s=1000, save_timeout_s=500), phases)
    assert watchdog.bound_s() == 1000
    phases.step_done(1)
    assert watchdog.bound_s() == 1000, "no step is timed yet"
    for step in range(2, 8):
        with phases("forward"):
            pass
        phases.step_done(step)
    assert watchdog.bound_s() == FLOOR_S
    phases._durations.extend([30.0] * 50)
    assert watchdog.bound_s() == 600
    with phases("save"):
        assert watchdog.bound_s() == 500
    with phases("forward"):
        assert watchdog.bound_s() == 500, "other ranks may still be saving"
    phases.step_done(8)
    assert watchdog.bound_s() == 600
    assert 30.0 in phases._durations and max(phases._durations) == 30.0
    assert Watchdog(Settings(step_timeout_s=3), phases).bound_s() == 3


def status(rank: int, entered: int, collectives: int, section: str = "forward") -> RankStatus:
    return RankStatus(
        rank, f"node{rank}", 1, 6, section, 70.0, entered, collectives, "nccl:all_gather (under way)", "a:1 f"
    )


def test_who_is_behind() -> None:
    hosts = ["node0", "node1", "node2"]
    rank, text = suspect_rank([status(0, 40, 9), status(1, 39, 9, "data"), status(2, 40, 9)], hosts)
    assert rank == 1 and "rank 1 on node1 is furthest behind: in data of step 7" in text and "wait in forward" in text
    assert suspect_rank([status(0, 40, 9), status(1, 40, 9), status(2, 40, 8)], hosts)[0] == 2
    rank, text = suspect_rank([status(0, 40, 8), status(1, 40, 9), status(2, 40, 8)], hosts)
    assert rank == 0 and "with 1 others as far" in text
    rank, text = suspect_rank([status(rank, 40, 9) for rank in range(3)], hosts)
    assert rank is None and "no rank is behind" in text and "nccl:all_gather" in text
    assert text.endswith("check the network between the nodes with bifrost slurm preflight")
    assert "network" not in suspect_rank([status(rank, 40, 9) for rank in range(3)], ["node0"] * 3)[1]
    rank, text = suspect_rank([status(0, 3, 9), status(2, 40, 9)], hosts)
    assert rank == 1 and "rank 1 on node1" in text and "does not answer" in text
    assert suspect_rank([status(0, 3, 9)], ["node0"]) == (0, "rank 0 on node0 is in forward of step 7, at a:1 f")
