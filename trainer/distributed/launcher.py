"""Which rank this process is, and the launcher of N ranks on this machine.

The launcher only supervises its ranks, even a single one: it answers Ctrl-C at once, whatever the ranks are doing. It
does not import torch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from ...data.processes import die_with_parent
from ...data.progress import progress
from ...slurm import launched_by, private_folders, rank_environment
from ...slurm.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED
from ...slurm.nodes import Node
from ...slurm.rank_env import LAUNCHER_VARIABLES
from .interrupt import interrupted, say
from .run_lock import remove_lock_of
from .stop_signals import ENDING, NOT_BEGUN, PHASE_FILE, SAVED, SAVING, SIGNALS, STARTING, TRAINING, farewell

GRACE_S = 10.0
"""Seconds that the other ranks have to exit by themselves after one has failed."""
QUIT_S = 0.5
"""The same after a Ctrl-C that saves nothing."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where the user may have set up torch's allocator; the second is the older name."""
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of GPU drivers in /dev."""


def init_from_env(ranks: int | None = None) -> bool:
    """Whether a launcher started this process as a rank; if so, set the rank variables from the launcher's.

    ranks: value of --ranks. If it is given, or there is no launcher, this process is not a rank, and variables left by
    an earlier launcher are removed. Raises SlurmError for variables that contradict each other.
    """
    launcher = launched_by(os.environ) if ranks is None else None
    if launcher is None:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        return False
    if launcher == "bifrost":
        die_with_parent(int(os.environ["BIFROST_LAUNCHER"]))
    os.environ.update(rank_environment(os.environ) or {})
    if launcher == "slurm":
        os.environ.update(private_folders(os.environ))
        tempfile.tempdir = None  # clears the cached folder
    if not any(name in os.environ for name in ALLOCATOR):
        # Captions differ in length from step to step, and gathered weights are freed on another stream than they were
        # allocated on: blocks of fixed sizes fragment. torch reads this once, when it first allocates on a GPU.
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    return True


def has_gpu_files() -> bool:
    """Whether this machine has a GPU driver's device files; True where that cannot be known."""
    return sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in GPU_FILES)


def devices() -> int:
    """Number of GPUs of this machine, 1 without any."""
    if not has_gpu_files():
        return 1
    # Only torch knows which of them it can use.
    asked = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=_safe_path())
    return max(1, int(found.stdout or 0))


def run_ranks(
    ranks: int,
    arguments: Sequence[str],
    run: Path | None = None,
    at_quit: Callable[[], None] = lambda: None,
    node: Node | None = None,
) -> int:
    """Run `python -m bifrost.trainer ARGUMENTS` as `ranks` ranks on this machine; returns their exit code.

    node: this machine among several, each with as many ranks; None if all ranks are on this one.

    When one rank fails the others are ended, and its code is returned. SIGTERM and SIGUSR1 are passed on to every
    rank. Ctrl-C ends them, with INTERRUPTED; ranks that train the run in folder `run` save first, unless there is
    nothing to save or it is pressed again; then, if they were training, `at_quit` is called after they have ended.
    """
    with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
        family = _Family(Path(folder), run is not None, node, node.rank * ranks if node else 0)
        # Children inherit the mask: a training rank must not receive a signal before it can save.
        before = {number: signal.signal(number, family.notice) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_BLOCK if family.trains else signal.SIG_UNBLOCK, SIGNALS)
        try:
            family.processes = [_start(local, ranks, arguments, family) for local in range(ranks)]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return family.wait()
        finally:
            for process in family.processes:
                process.kill()
                process.wait()
            if run is not None and family.quit_at and family.phase() == TRAINING:
                at_quit()
            if run is not None and family.quit_at:  # otherwise the next attempt reads from it when this one died
                remove_lock_of(run, [process.pid for process in family.processes])
            for number, handler in before.items():
                signal.signal(number, handler)


def run_child(module: str, *arguments: str, counts: str | None = None, passed_on: Sequence[signal.Signals] = ()) -> int:
    """Run `python -m MODULE ARGUMENTS` as a process that never outlives this one; returns its exit code.

    counts: what its output lines count, shown as progress; its first line begins with their total. passed_on: signals
    that the process answers, instead of this one.
    """
    # A session of its own: this process handles Ctrl-C on the terminal.
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=_safe_path(),
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
        stdout=subprocess.PIPE if counts else None,
        text=True,
    ) as child:

        def pass_on(number: int, frame: FrameType | None) -> None:
            if child.poll() is None:
                child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in passed_on}
        try:
            if counts and child.stdout:
                first = child.stdout.readline()
                print(first, end="", flush=True)
                total = int(number[0]) if (number := re.match(r"\d+", first)) else None
                with progress("compiling", total, counts) as shown:
                    for number, line in enumerate(child.stdout):
                        print(line, end="", flush=True)
                        if total is None or number < total:  # other lines may follow
                            shown.advance()
            return child.wait()
        finally:
            child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Family:
    """The ranks that this process has started, and their signal handling. folder: that of their rendezvous. first:
    the lowest of their ranks."""

    def __init__(self, folder: Path, trains: bool, node: Node | None, first: int) -> None:
        self.folder = folder
        self.trains = trains
        self.node = node
        self.first = first
        self.processes: list[subprocess.Popen] = []
        self.quit_at: float | None = None
        """`time.monotonic()` at which the ranks are ended, set by Ctrl-C."""
        self.stopped_by: str | None = None
        """Name of the last stop signal other than Ctrl-C."""
        self._pressed_in: str | None = None

    @property
    def phase_file(self) -> Path:
        return self.folder / "phase"

    def notice(self, number: int, frame: FrameType | None) -> None:
        """Handle a stop signal."""
        if number == signal.SIGINT:
            # Recorded before anything is printed: the next Ctrl-C may interrupt this handler.
            phase, before = self.phase(), self._pressed_in
            self._pressed_in = phase
            if self.trains and phase not in (STARTING, before):
                say(SAVED if phase == ENDING else SAVING)
            elif self.quit_at is None:
                self.quit_at = time.monotonic() + (QUIT_S if self.trains else 0)
                say(farewell(phase) if self.trains else interrupted())
        else:
            self.stopped_by = signal.Signals(number).name
        for process in self.processes:
            if process.poll() is None and (self.trains or number != signal.SIGINT):
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all ranks, after the first failure for GRACE_S at most; returns their common exit code."""
        deadline = None
        while True:
            codes = [process.poll() for process in self.processes]
            if self.quit_at and (None not in codes or time.monotonic() > self.quit_at):
                return INTERRUPTED
            failed = [code for code in codes if code]
            if None not in codes or (deadline and time.monotonic() > deadline):
                # A rank that died of a signal explains the others' failures, and so does one that exited on purpose.
                # NCCL aborts ranks that lose a peer.
                code = min(failed, key=lambda code: (code > 0, code in (FAILED, -signal.SIGABRT)), default=DONE)
                if code < 0:  # it could not report that itself
                    say(_death(self.first + codes.index(code), -code, self.trains))
                elif code == FAILED and (line := self._lost(codes)):
                    say(line)
                elif code == STOPPED and self.stopped_by and self.first == 0 and self.phase() == STARTING:
                    say(NOT_BEGUN.format(self.stopped_by))
                return code
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE_S
            time.sleep(0.05)

    def _lost(self, codes: Sequence[int | None]) -> str | None:
        """The line of a rank that lost a peer, if no rank failed otherwise: then no rank has printed an error."""
        failed = [lost_file(self.phase_file, rank) for rank, code in enumerate(codes, self.first) if code]
        return failed[0].read_text() if all(file.exists() for file in failed) else None

    def phase(self) -> str:
        """The phase that rank 0 wrote last."""
        try:
            return self.phase_file.read_text() or STARTING
        except OSError:
            return STARTING


def lost_file(phase_file: Path, rank: int) -> Path:
    """The file with the error line of a `rank` that has lost another rank, for the launcher."""
    return phase_file.with_name(f"lost-{rank}")


def _death(rank: int, number: int, trains: bool) -> str:
    """The error line for a rank that died of signal `number`."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    fewer = "lower micro_batch or data.workers" if trains else "start fewer ranks"
    cause = f", mostly for lack of memory: {fewer}" if number == signal.SIGKILL else ""
    remedy = "; the same command continues from the last checkpoint" if trains else ""
    return f"error: rank {rank} was ended by {name}{cause}{remedy}"


def _safe_path() -> dict[str, str]:
    # The checkout's `kernels/` and `data/` must not shadow distributions of those names.
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def _start(local: int, ranks: int, arguments: Sequence[str], family: _Family) -> subprocess.Popen:
    node = family.node
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **_safe_path(),
        "RANK": str(family.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(ranks * (node.count if node else 1)),
        "BIFROST_LAUNCHER": str(os.getpid()),
        PHASE_FILE: str(family.phase_file),
    }
    if node:
        environment |= {"MASTER_ADDR": node.address, "MASTER_PORT": str(node.port)}
    else:
        # Local ranks use a file store and loopback: no port that may be taken, no host name to resolve.
        environment["BIFROST_RENDEZVOUS"] = str(family.folder / "rendezvous")
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # A session of its own: a Ctrl-C on the terminal reaches the ranks once, through us.
    return subprocess.Popen(
        [sys.executable, "-m", "bifrost.trainer", *arguments], env=environment, start_new_session=True
    )
