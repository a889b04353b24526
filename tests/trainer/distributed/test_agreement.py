"""What fails on one rank at the start ends all of them, with its line and its code; foreseen errors are one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch

import ranked
import runs
from bifrost.data import DataError, DataLost
from bifrost.trainer.cli import main
from bifrost.trainer.distributed import process_group
from bifrost.trainer.errors import RunError, Unhealthy, foreseen


@pytest.fixture
def together(monkeypatch):
    """Runs a function of a `Ranks` on threads that stand for ranks; each one's result or error."""

    def run(function, size=3):
        meeting, me, slots = threading.Barrier(size, timeout=10), threading.local(), [None] * size

        def all_gather_object(values, value):
            slots[me.rank] = pickle.dumps(value)
            meeting.wait()
            values[:] = [pickle.loads(slot) for slot in slots]
            meeting.wait()

        def broadcast_object_list(values, src):
            answers = [None] * size
            all_gather_object(answers, ("broadcast", values))
            assert all(kind == "broadcast" for kind, _ in answers), "another collective on some rank"
            values[:] = answers[src][1]

        monkeypatch.setattr(process_group.dist, "all_gather_object", all_gather_object)
        monkeypatch.setattr(process_group.dist, "broadcast_object_list", broadcast_object_list)
        outcomes = [None] * size

        def work(rank):
            me.rank = rank
            try:
                outcomes[rank] = function(process_group.Ranks(rank, size, torch.device("cpu")))
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "a rank waits"
        return outcomes

    return run


def fails_at(rank: int, moment: int, error: Exception):
    """An action of four moments with gathers and broadcasts between them; it fails on `rank` at `moment`."""

    def act(me: process_group.Ranks):
        def action():
            for now in range(4):
                if (me.rank, now) == (rank, moment):
                    raise error
                if now % 2:
                    assert me.broadcast((me.rank, now)) == (0, now)
                assert me.gather((me.rank, now)) == [(other, now) for other in range(me.size)]
            return "done"

        first = me.agreed(action)
        return first, me.gather("after")

    return act


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize(
    ("error", "kind", "line", "transient"),
    [
        (RunError("folder: fix it"), RunError, "folder: fix it", False),
        (DataLost("x.tar: away"), DataLost, "x.tar: away", True),
        (OSError(errno.ESTALE, "Stale file handle", "/base/a"), DataLost, "rank 1: /base/a: Stale file handle;", True),
        (OSError(errno.ENOSPC, "No space left", "/runs/a"), DataError, "rank 1: /runs/a: No space left; free", False),
    ],
)
def test_one_rank_that_fails_between_gathers_ends_all(together, moment, error, kind, line, transient) -> None:
    for outcome in together(fails_at(1, moment, error)):
        assert type(outcome) is kind and str(outcome).startswith(line) and outcome.transient is transient


def test_nobody_fails(together) -> None:
    assert together(fails_at(9, 9, RunError("x"))) == [("done", ["after"] * 3)] * 3


def test_several_that_fail_raise_one(together) -> None:
    def act(me):
        def action():
            if me.rank:
                raise RunError(f"of {me.rank}")
            me.gather(None)

        me.agreed(action)

    assert [str(outcome) for outcome in together(act)] == ["of 1"] * 3


def test_a_bug_is_raised_on_its_rank_and_named_on_the_others(together) -> None:
    first, second, third = together(fails_at(1, 2, KeyError("bug")))
    assert type(second) is KeyError
    assert type(first) is type(third) is Unhealthy and str(first).startswith("rank 1: startup failed with KeyError")


def test_one_rank_alone() -> None:
    one = process_group.Ranks(0, 1, torch.device("cpu"))
    assert one.agreed(lambda: one.gather(3)) == [3] and one.broadcast(4) == 4
    with pytest.raises(DataError, match=r"^/x: No space"):
        one.agreed(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space", "/x")))
    with pytest.raises(KeyError):
        one.agreed(lambda: {}[1])


@pytest.mark.parametrize(
    ("error", "line", "transient"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
            ),
            "the GPU's memory is full (CUDA out of memory); lower micro_batch",
            False,
        ),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "the GPU's memory is full (CUDA error", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU's memory is full", False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "this machine's memory is full",
            False,
        ),
        (MemoryError(), "this machine's memory is full (MemoryError)", False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine's memory is full", False),
        (OSError(errno.EIO, "Input/output error", "/a/b"), "/a/b: Input/output error; check the storage", True),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; check the perm", False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "ConnectionRefusedError: Connec", True),
        (Exception("I/O error: Stale file handle (os error 116)"), "Exception: I/O error: Stale", True),
    ],
    ids=lambda value: str(value)[:30],
)
def test_foreseen_errors_are_one_line(error, line, transient) -> None:
    found = foreseen(error)
    assert str(found).startswith(line) and "\n" not in str(found) and found.transient is transient


def test_bugs_are_not_foreseen() -> None:
    for error in (KeyError("x"), RuntimeError("shape"), AssertionError(), ValueError("x"), TypeError("x")):
        assert foreseen(error) is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried')", 2, "error: the GPU's memory is full"),
        ("OSError(116, 'Stale file handle', '/a/b')", 74, "error: /a/b: Stale file handle; check the storage"),
        ("OSError(28, 'No space left on device', '/a/b')", 2, "error: /a/b: No space left on device; free disk"),
    ],
)
def test_every_command_says_them_in_one_line(monkeypatch, capsys, tmp_path, error, code, line) -> None:
    def command(*_, **__):
        raise eval(error, {"torch": torch})

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(main, "app", command)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("BIFROST_RUN", str(tmp_path))
    (tmp_path / "slurm").mkdir()
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
    assert json.loads((tmp_path / "slurm" / "exit_record.json").read_text())["code"] == code


STEPS = {
    "base model": "stages.patch_latents.load_tokenizer",
    "watchdog": "monitors.watchdog:Watchdog.attach",
    "frozen weights": "models.weights:WeightFiles.content_hash",
    "checkpoints": "training.resume_point.check_continuation",
    "kernels": "stages.patch_latents:PatchLatentStage.choose_kernels",
    "weights": "stages.patch_latents:PatchLatentStage.load",
    "restore": "training.build.restore",
    "settings": "training.run_record.last_settings",
    "log": "training.run_record.log_to_file",
    "previews": "training.build._previews",
}
"""What is done at the start, and a function on its way: `module:class.method` or `module.function`."""


def fail_in_turn(arguments: list[str], steps: dict[str, str]) -> dict[str, str]:
    """On rank 1 alone, storage fails in each step of the start; what each rank raised."""
    import importlib
    import sys

    from bifrost.trainer.training import run_context
    from bifrost.trainer.training.train import train

    joined = []
    real = run_context.join

    def join(*args):
        joined[:] = joined or [real(*args)]
        return joined[0]

    run_context.join = join
    said = {}
    for step, name in steps.items():
        place, _, method = name.rpartition(".")
        module, _, owner = place.partition(":")
        target = importlib.import_module(f"bifrost.trainer.{module}")
        target = getattr(target, owner) if owner else target

        def fails(*args, _step=step, **kwargs):
            raise OSError(116, "Stale file handle", f"/away/{_step}")

        before = getattr(target, method)
        if os.environ["RANK"] == "1":
            setattr(target, method, fails)
        sys.argv = ["bifrost", *arguments]
        try:
            train(load(arguments))
            said[step] = "trained"
        except Exception as error:
            said[step] = f"{type(error).__name__} {getattr(error, 'transient', None)} {error}"
        setattr(target, method, before)
    return said


def load(arguments: list[str]):
    from bifrost.recipes import load_recipe

    return load_recipe(arguments[1], arguments[2:])


@pytest.mark.multi
@pytest.mark.slow
def test_storage_that_fails_on_one_rank_in_any_step_of_the_start(shards: Path, tmp_path: Path) -> None:
    """Every rank ends with that rank's line, as something that may pass; none is left in a collective."""
    arguments = runs.arguments(shards, tmp_path, "steps=2", "checkpoint.every=1")
    assert [rank.code for rank in ranked.bifrost(2, *arguments)] == [0, 0]
    ended = ranked.run(fail_in_turn, 2, [*arguments, "steps=3"], STEPS, timeout=120)
    for step in STEPS:
        for rank in ended:
            assert rank.value, rank.err
            assert re.match(rf"(DataLost|RunError) True (rank 1: )?/away/{step}: Stale file", rank.value[step]), step
