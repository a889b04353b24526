"""Atomic initialisation of MLflow's SQLite store.

MLflow creates its tables in place and cannot continue an interrupted initialisation: every later start fails with
"table … already exists". Therefore a separate process that ignores stop signals builds the file under another name,
under a lock, and renames it. A partial store without experiments or models is replaced.

`python -m bifrost.trainer.monitors.mlflow_store URI` runs that process.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import RunError

QUIET_S = 10.0
"""A partial store that has not changed for this long is not being initialised by another process."""
LONGEST_S = 120.0
"""Maximum wait for another process that initialises the store."""
CONTENT = ("experiments", "runs", "registered_models")
"""At least one of these tables has a row in every initialised store: MLflow adds an experiment as the last step."""


def ensure_store(uri: str) -> None:
    """Initialise the store if `uri` is an SQLite file that is not initialised yet.

    If the caller is killed, the initialisation continues to its end. Raises RunError if it fails.
    """
    path = database(uri)
    if path is None or is_set_up(path):
        return
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, uri],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONSAFEPATH": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            start_new_session=True,
        )
        if process.wait():
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            raise RunError(f"{path}: MLflow's store could not be set up: {lines[-1] if lines else process.returncode}")


def database(uri: str) -> Path | None:
    """File of an SQLite URI; None for other URIs."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    return Path(name).absolute() if name and name != ":memory:" and not name.startswith("file:") else None


def is_database(uri: str) -> bool:
    """Whether MLflow accesses a database at `uri` directly, without a server."""
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def is_set_up(path: Path) -> bool:
    """Whether `path` is an initialised store. Raises sqlite3.Error if it is not a database, or locked."""
    if not path.exists():
        return False
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables & set(CONTENT))


def require_current(uri: str) -> None:
    """Raise RunError if the database of `uri` has the schema of another MLflow version: MLflow would migrate an older
    one in place without asking, and an interrupted migration cannot be repeated."""
    from importlib.metadata import version
    from importlib.util import find_spec

    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    package = find_spec("mlflow")
    assert package is not None and package.origin is not None
    scripts = ScriptDirectory(Path(package.origin).parent / "store" / "db_migrations")
    if found is None or found == scripts.get_current_head():
        return
    shown, ours = engine.url.render_as_string(), f"MLflow {version('mlflow')}"
    if any(script.revision == found for script in scripts.walk_revisions()):
        raise RunError(
            f"{shown} was written by an older MLflow than {ours}: make a copy of it, then run"
            f" `mlflow db upgrade {shown}`"
        )
    raise RunError(f"{shown} was written by a newer MLflow than {ours}: install that one, or set another tracking.uri")


def set_up(uri: str) -> None:
    """Initialise the SQLite file of `uri`, unless another process does so first. Raises OSError, sqlite3.Error and
    MLflow's errors."""
    path = database(uri)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in path.parent.glob(f".{path.name}.*.partial*"):
            left.unlink(missing_ok=True)
        if is_set_up(path):
            return
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        _build(uri, aside)
        if _others_set_up(path):
            aside.unlink()
            return
        # Remove the partial file first: SQLite would roll its journal back into the new one.
        for half_made in (path, *_companions(path)):
            half_made.unlink(missing_ok=True)
        aside.replace(path)


def _others_set_up(path: Path) -> bool:
    """Wait while another program, such as `mlflow ui`, initialises `path` in place; return whether it succeeded."""
    limit = time.monotonic() + LONGEST_S
    seen, since = _mark(path), time.monotonic()
    while seen is not None and time.monotonic() - since < QUIET_S:
        if is_set_up(path):
            return True
        time.sleep(0.2)
        if (now := _mark(path)) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() > limit:
            raise TimeoutError(f"another program has been setting it up for {LONGEST_S:.0f} s")
    return False


def _mark(path: Path) -> Any:
    """Sizes and times, which change with every write; None if there is nothing to wait for."""
    if not path.exists() or not path.stat().st_size:
        return None
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in (path, *_companions(path)) if file.exists()]


def _build(uri: str, aside: Path) -> None:
    from mlflow import MlflowClient
    from sqlalchemy.engine import make_url

    MlflowClient(make_url(uri).set(database=str(aside)).render_as_string(hide_password=False)).search_experiments()
    descriptor = os.open(aside, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _companions(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm")]


def main(uri: str) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        set_up(uri)
    except Exception as error:  # the caller reads the last line
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
