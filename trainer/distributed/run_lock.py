"""At most one live attempt per run: `lock.json` in the run folder names its owner and the time of its last heartbeat.

The storage must support exclusive file creation and atomic renames, as network file systems do. Ages are measured by
the storage's own clock, so the nodes' clocks may differ.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...data.units import format_seconds
from ...slurm.exit_codes import LOCKED
from ...slurm.exit_record import record_outcome
from ...slurm.rank_env import host_name
from ..errors import Locked, RunError

log = logging.getLogger(__name__)

FILE = "lock.json"
BEAT_S = 10.0
"""Seconds between heartbeats."""
STALE_S = 120.0
"""An owner without a heartbeat for this many seconds counts as dead."""
SIZE = 1024  # bytes of the file: written in place, it must never be seen shorter


class RunLock:
    """The lock of the run in `folder`; released by `release` or at the end of a `with` block, if it is held."""

    def __init__(self, folder: Path, stale_s: float = STALE_S) -> None:
        import psutil

        self.path = folder / FILE
        self.stale_s = stale_s
        self._file: int | None = None
        self._owner: dict[str, Any] = {
            "host": host_name(),
            "pid": os.getpid(),
            "space": _pid_space(),
            "born": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "started": time.time(),
            "token": uuid.uuid4().hex,
        }

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> dict[str, Any] | None:
        """Take the lock; returns the dead owner that it was taken from, None where there was none.

        If the owner runs on this machine, Locked is raised at once. If it runs on another node, Locked is raised at its
        next heartbeat; `stale_s` seconds without one make it dead. Raises RunError where the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(self.path):
                owner = _read(self.path)
                if owner is None:
                    continue  # released just now
                reason = self._await_death(self.path, owner)
                if reason is not None and self._take_over(self.path, owner):
                    log.warning("%s: taken over from %s: %s", self.path, describe(owner), reason)
                    return owner
        except OSError as error:
            raise RunError.from_storage_error(self.path.parent, error) from error
        return None

    def beat(self, step: int) -> None:
        """Write a heartbeat with the steps done. Ends the process if another attempt has taken the lock, which happens
        only when heartbeats were missing for too long. Write failures are ignored."""
        if self._file is None:
            return
        with suppress(OSError):  # unavailable storage shows nothing about the owner
            if os.stat(self.path).st_ino != os.fstat(self._file).st_ino:
                line = f"{self.path} was taken over while this process was stalled"
                print(f"error: {line}", file=sys.stderr, flush=True)
                record_outcome(LOCKED, line)
                os._exit(LOCKED)
            self._write(step)

    def release(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            if os.stat(self.path).st_ino == os.fstat(self._file).st_ino:
                self.path.unlink()
                self.path.parent.rmdir()  # where nothing has been written to the run yet
        os.close(self._file)
        self._file = None

    def _create(self, path: Path) -> bool:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        self._write(step=None)
        return True

    def _write(self, step: int | None) -> None:
        assert self._file is not None
        text = json.dumps({**self._owner, "beat": time.time(), "step": step})
        os.pwrite(self._file, text.ljust(SIZE - 1).encode() + b"\n", 0)
        os.fsync(self._file)

    def _await_death(self, path: Path, owner: Mapping[str, Any]) -> str | None:
        """Why the file's `owner` counts as dead; None if the owner changed meanwhile. Raises Locked if alive."""
        if owner.get("space") == self._owner["space"]:
            if not _runs(owner):
                return "its process is gone"
            raise Locked(self._refusal(owner))
        job = self._owner["job"]
        if job and owner.get("job") == job and self._owner["restarts"] > owner["restarts"]:
            return "it was an earlier attempt of this job"
        while (age := _storage_time(self.path.parent) - owner["seen"]) <= self.stale_s:
            time.sleep(min(1.0, self.stale_s / 10))
            now = _read(path)
            if now is None or now["token"] != owner["token"]:
                return None
            if now["seen"] != owner["seen"]:
                raise Locked(self._refusal(now))
        return f"no heartbeat for {age:.0f} s"

    def _take_over(self, path: Path, owner: Mapping[str, Any]) -> bool:
        """Replace the dead `owner` of the file by this attempt; False when another attempt has done so."""
        # Only one process can create the claim file of this owner, and only it replaces the lock. If it dies in
        # between, its claim is taken over in the same way.
        claim = self.path.with_name(f"{FILE}.after-{owner['token']}")
        if not self._create(claim):
            other = _read(claim)
            if other is None or self._await_death(claim, other) is None or not self._take_over(claim, other):
                return False
        now = _read(path)
        if now is not None and now["token"] == owner["token"]:
            claim.replace(path)
            return True
        claim.unlink()
        os.close(self._file or 0)
        self._file = None
        return False

    def _refusal(self, owner: Mapping[str, Any]) -> str:
        return f"{self.path.parent}: another attempt of this run is alive: {describe(owner)}; nothing was touched"


def remove_lock_of(folder: Path, processes: Collection[int]) -> None:
    """Remove the lock of the run in `folder` if one of these processes of this host, which have ended, holds it."""
    with suppress(OSError):
        owner = _read(folder / FILE) or {}
        if owner.get("space") == _pid_space() and owner["pid"] in processes:
            (folder / FILE).unlink()
            folder.rmdir()  # where nothing has been written to the run yet


def describe(owner: Mapping[str, Any]) -> str:
    """`process 17 on node3, Slurm job 42, for 3 h 20 min`, for a line that names an owner."""
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    age = format_seconds(max(0.0, time.time() - owner.get("started", time.time())))
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, for {age}"


def _read(path: Path) -> dict[str, Any] | None:
    """The owner, with `seen`, the storage's time of its last heartbeat; None where there is no lock."""
    try:
        with open(path, "rb") as file:  # reopened, so that a network file system asks its server
            status, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
    except ValueError:  # just created, or its creator died before writing it
        owner = {"token": f"{status.st_ino}-{status.st_mtime_ns}", "restarts": 0}
    return {**owner, "seen": status.st_mtime}


def _runs(owner: Mapping[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(owner["pid"])
        return abs(process.create_time() - owner["born"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pid_space() -> str:
    """The scope in which process ids are valid: this boot of this machine, and the container."""
    if sys.platform != "linux":
        return platform.node()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _storage_time(folder: Path) -> float:
    """Current time of the clock that sets the mtimes of files in `folder`."""
    probe = folder / f".now-{uuid.uuid4().hex}"
    try:
        with open(probe, "xb") as file:
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)
