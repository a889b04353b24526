"""A real MLflow server in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from bifrost.slurm.rank_env import free_port


class Server:
    """A server at `uri` with its database and artifacts in `folder`, which a `start` after a `kill` reuses."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server; returns when it responds."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/files"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.2)
        pytest.fail((self.folder / "log").read_text())

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(9)
        self.process.wait()
