"""A run in W&B: one W&B run for all attempts, with the current content of the metrics file."""

from __future__ import annotations

import json
import netrc
import os
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...recipes.secrets import redact
from ...slurm.io import write_json
from ..errors import RunError, Unreachable
from ..io import read_json
from .evaluations import FILE as EVALUATIONS
from .metrics import Tail
from .renames import PREVIEWS
from .series import series, when
from .tracker_errors import one_line
from .tracker_state import is_copy, last_end, lock, new_previews, outcome_of, read_recipe

FILE = "wandb.json"
FOLDER = "wandb"
HOST = "https://api.wandb.ai"
INIT_S = 30.0
"""Seconds after which a server that does not answer counts as failed."""
ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class WandbRun:
    """The W&B run of a training run; its id is in `wandb.json`.

    A W&B run can only be appended to, and a training run drops steps when it resumes or rolls back. Therefore each
    attempt, each change of earlier lines and each error begins the W&B run again, under the same id, with the complete
    history: offline in a new folder that replaces the one before, online in place of what W&B has of it.

    Raises RunError if `run_dir` has no recipe or another process is sending it, OSError if it cannot be written.
    """

    def __init__(self, run_dir: Path, live: bool):
        self.folder = run_dir
        self.recipe = read_recipe(run_dir)
        self._lock = lock(run_dir / ".wandb.lock")
        self.server = "W&B"
        self.sent = 0
        self.file_error: str | None = None
        self._run: Any = None
        self._place = ""
        path = run_dir / FILE
        state = read_json(path) or {}
        if path.exists() and "key" not in state:
            raise RunError(f"{path} is damaged: remove it, and the run is sent to a new W&B run")
        if not state or is_copy(state, run_dir, FILE):
            state = {"key": uuid.uuid4().hex}
        self._id: str = state["key"]
        write_json(path, {"key": self._id, "folder": str(run_dir.resolve())})

    def push(self, last: bool) -> None:
        """Log new points and previews. Raises W&B's errors; the next call then begins the W&B run again."""
        try:
            if self._run is not None and not self._append():
                self._discard()
            if self._run is None:
                self._begin()
        except Exception:
            self._discard()
            raise

    def end(self, otherwise: str | None) -> None:
        """Finish the W&B run with the outcome of the newest `end` event unless the run was restarted since, else
        `otherwise`. W&B shows a run that was stopped as preempted. One that has not ended is finished as failed."""
        outcome = outcome_of(last_end(self.folder / "metrics.jsonl"), otherwise)
        folder, offline = Path(self._run.dir).parent, self._run.offline
        try:
            if outcome in ("stopped", "interrupted"):
                self._run.mark_preempting()
            self._run.finish(exit_code=int(outcome != "finished"))
        finally:
            self._discard()
        if offline and (stored := rows(folder)) < self._rows:
            raise Unreachable(f"{folder} has {stored} of {self._rows} rows: free disk space")

    def address(self) -> str:
        return self._place

    def close(self) -> None:
        self._lock.close()

    def _begin(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        older = self._folders()
        if older:  # a folder is named by the second of its `init`
            time.sleep(max(0.0, min(1.0, 1.0 + max(each.stat().st_mtime for each in older) - time.time())))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
        environment = read_json(self.folder / "environment.json") or {}
        self._run = wandb.init(
            project=(self.recipe.get("tracking") or {}).get("experiment", "bifrost"),
            id=self._id,
            name=self.folder.name,
            dir=self.folder,
            mode=mode,
            config=json.loads(redact(json.dumps({**self.recipe, "environment": environment}))),
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                init_timeout=INIT_S,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        self._place = self._run.url or f"`wandb sync {Path(self._run.dir).parent}` uploads it"
        self._tails = [Tail(self.folder / "metrics.jsonl"), Tail(self.folder / EVALUATIONS)]
        self._previews: dict[str, tuple[int, int]] = {}
        self.sent = self._rows = 0
        self._append()
        for each in older:
            shutil.rmtree(each)

    def _folders(self) -> list[Path]:
        """The folders of this W&B run, of which wandb makes one per `init`."""
        return [each for each in (self.folder / FOLDER).glob(f"*run-*-{self._id}") if not each.is_symlink()]

    def _append(self) -> bool:
        """Log what is new; return False if earlier records have changed."""
        records = [record for tail in self._tails for record in tail.read()]
        if any(tail.replaced for tail in self._tails):
            return False
        for record in records:
            if points := dict(series(record)):
                self._log(record["step"], points, when(record))
                self.sent += len(points)
        self._send_previews()
        return True

    def _send_previews(self) -> None:
        import wandb

        self.file_error = None
        for preview in new_previews(self.folder, self._previews):
            try:
                image = wandb.Image(str(preview.path))
            except OSError as error:
                self.file_error = one_line(error)
                del self._previews[preview.path.name]
            else:
                self._log(preview.step, {PREVIEWS: image}, preview.written)

    def _log(self, step: int, row: dict[str, Any], moment: float) -> None:
        self._run.log({"step": step, **row, "_timestamp": moment})
        self._rows += 1

    def _discard(self) -> None:
        """End W&B's own process, which may have died or not answer."""
        self._run = None
        with suppress(Exception):
            import wandb

            wandb.teardown(exit_code=1)


def rows(folder: Path) -> int:
    """The rows that an offline folder has, by wandb's own reader: wandb does not report that a disk was full."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        assert reader.stdout is not None
        return sum(b'"type":"history"' in line for line in reader.stdout)


def _has_login() -> bool:
    """Whether W&B's server can be used: an API key in WANDB_API_KEY or, from `wandb login`, in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or HOST).hostname
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    return False
