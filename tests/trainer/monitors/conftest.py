"""A real MLflow server, and a door in front of it that can be shut or stuck."""

import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from bifrost.trainer.monitors.metrics import MetricsFile
from mlflow_server import Server


@pytest.fixture(autouse=True)
def _no_server_of_the_user(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address of an MLflow server with a database and artifacts of its own."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(server)


class Door:
    """A port of its own: refuses at first, then `hang` (accepts, never answers) or `open_to` a server."""

    def __init__(self):
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = None
        self.held = []

    def hang(self):
        self._socket.listen(50)
        threading.Thread(target=self._accept, daemon=True).start()

    def open_to(self, server):
        self._server = server
        if not self.held:
            self.hang()

    def _accept(self):
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            self.held.append(near)
            if self._server:
                far = socket.create_connection(("127.0.0.1", int(self._server.rpartition(":")[2])))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        for held in [self._socket, *self.held]:
            held.close()


@pytest.fixture
def door():
    door = Door()
    yield door
    door.close()


@pytest.fixture
def make_run(tmp_path):
    """(uri) -> a run folder with its recipe, and its metrics file."""

    def make(uri=None):
        folder = tmp_path / "runs" / "demo"
        folder.mkdir(parents=True)
        tracking = f"{{uri: {uri or 'null'}, experiment: bifrost}}"
        recipe = f"name: demo\noptimizer: {{lr: 0.1, betas: [0.9, 0.95]}}\ntracking: {tracking}\n"
        (folder / "recipe.yaml").write_text(recipe)
        return SimpleNamespace(folder=folder, metrics=MetricsFile(folder / "metrics.jsonl"))

    return make


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory) -> bytes:
    """Content of a store that was set up, by a caller that is killed as soon as its set-up works."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    script = "import sys; from bifrost.trainer.monitors.mlflow_store import ensure_store; ensure_store(sys.argv[1])"
    caller = subprocess.Popen([sys.executable, "-c", script, f"sqlite:///{path}"])
    _wait_until(lambda: any(path.parent.glob(".mlflow.db.*.partial")))
    assert not path.exists()
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _wait_until(path.exists)
    assert [file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")] == ["mlflow.db"]
    return path.read_bytes()


def _wait_until(true, seconds=60):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)
