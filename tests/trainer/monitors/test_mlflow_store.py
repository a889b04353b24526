"""MLflow's SQLite file is set up whole or not at all, whoever is killed when, and never migrated unasked."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import mlflow_store
from bifrost.trainer.monitors.mlflow_run import MlflowRun

OWN_SET_UP = """
import os, signal, sys
import mlflow.store.db.utils as db
original = db._upgrade_db
def killed(engine):
    os.kill(os.getpid(), signal.SIGKILL)
db._upgrade_db = killed
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).search_experiments()
"""
"""MLflow's set-up in place, killed between its first tables and its migrations."""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, whole_store: bytes):
    """The slow part, MLflow's own set-up of a new file, as a copy; counts its calls."""
    calls = []

    def copied(_uri: str, aside: Path) -> None:
        calls.append(aside)
        time.sleep(0.3)
        aside.write_bytes(whole_store)

    monkeypatch.setattr(mlflow_store, "_build", copied)
    monkeypatch.setattr(mlflow_store, "QUIET_S", 0.5)
    return calls


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_a_caller_that_is_killed_leaves_a_whole_store(whole_store: bytes, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    path.write_bytes(whole_store)
    assert mlflow_store.is_set_up(path)
    mlflow_store.require_current(f"sqlite:///{path}")


def test_a_partial_store_of_mlflow_is_replaced(tmp_path: Path, whole_store: bytes, build) -> None:
    path = tmp_path / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", OWN_SET_UP, f"sqlite:///{path}"], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "runs" in tables(path) and "alembic_version" not in tables(path)
    (tmp_path / "mlflow.db-journal").write_bytes(b"left")
    mlflow_store.set_up(f"sqlite:///{path}")
    assert path.read_bytes() == whole_store
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["mlflow.db"]


def test_a_set_up_that_died_leaves_nothing_that_matters(tmp_path: Path, whole_store: bytes, build) -> None:
    path = tmp_path / "mlflow.db"
    (tmp_path / ".mlflow.db.0123.partial").write_bytes(whole_store[:5000])
    mlflow_store.set_up(f"sqlite:///{path}")
    assert path.read_bytes() == whole_store and not list(tmp_path.glob(".*partial*"))


def test_two_first_runs_at_once_set_up_one_store(tmp_path: Path, build) -> None:
    path = tmp_path / "new" / "mlflow.db"
    threads = [threading.Thread(target=mlflow_store.set_up, args=(f"sqlite:///{path}",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(build) == 1 and mlflow_store.is_set_up(path)


def test_another_program_at_the_same_work_is_left_to_it(tmp_path: Path, whole_store: bytes, build) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id)")
        worker = threading.Thread(target=mlflow_store.set_up, args=(f"sqlite:///{path}",))
        worker.start()
        for number in range(8):  # longer than QUIET_S in all
            time.sleep(0.15)
            connection.execute(f"CREATE TABLE t{number} (a)")
        connection.execute("INSERT INTO experiments VALUES (0)")
        connection.commit()
        worker.join()
    assert "t7" in tables(path) and path.read_bytes() != whole_store


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("181f10493468", r"was written by an older MLflow .* then run `mlflow db upgrade sqlite:///.*mlflow.db`"),
        ("ffffffffffff", r"was written by a newer MLflow than MLflow 3"),
    ],
)
def test_the_schema_of_another_version_is_left_as_it_is(make_run, whole_store: bytes, version: str, said: str) -> None:
    run = make_run()
    path = run.folder.parent / "mlflow.db"
    path.write_bytes(whole_store)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.execute("DROP TABLE trace_info")  # as an older version, which has none: MLflow would migrate
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(RunError, match=said):
        MlflowRun(run.folder, live=True).push(last=True)
    assert path.read_bytes() == before


def test_a_set_up_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"mlflow.db: MLflow's store could not be set up: \w+Error: .*file"):
        mlflow_store.ensure_store(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_stop_signals_do_not_end_a_set_up(tmp_path: Path, whole_store: bytes) -> None:
    """Slurm sends them to every process of a job."""
    path = tmp_path / "mlflow.db"
    path.write_bytes(whole_store)
    ready = "from bifrost.trainer.monitors import mlflow_store as m"
    ready += "; m.set_up = lambda uri: print('on', flush=True) or input()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{ready}; raise SystemExit(m.main('sqlite:///{path}'))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(process.pid, number)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite+pysqlite:////a/b.db?timeout=5", "/a/b.db"),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("http://host:5000", None),
        ("postgresql://user@host/mlflow", None),
    ],
)
def test_which_addresses_are_files(uri: str, path: str | None) -> None:
    assert mlflow_store.database(uri) == (Path(path) if path else None)
