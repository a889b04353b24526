"""bifrost doctor on machines that are not this one: stand-ins print what the real tools print."""

import errno
import fcntl
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from bifrost.slurm.reachable import NEEDED
from bifrost.trainer.cli import doctor
from bifrost.trainer.doctor import finding, folders, machine, software, tracker
from bifrost.trainer.doctor.finding import Finding

H100 = "NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0, Disabled"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """tool(name, script) is all that PATH has besides a shell's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "sleep"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def rows(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def smi(*gpus: str, cuda: str = "13.0") -> str:
    header = f"| NVIDIA-SMI 570.86.15     Driver Version: 570.86.15     CUDA Version: {cuda}     |"
    listed = "\n".join(gpus)
    return f'if [ -n "$1" ]; then cat <<E\n{listed}\nE\nelse echo "{header}"; fi'


@pytest.mark.parametrize(
    ("script", "cuda", "what", "verdict", "found", "remedy"),
    [
        (smi(*[H100] * 8), "13.0", "GPUs", "ok", "8 x NVIDIA H100 80GB HBM3, 80 GiB", ""),
        (smi(H100), "13.0", "NVIDIA driver", "ok", "570.86.15, supports CUDA up to 13.0", ""),
        (smi(H100, cuda="12.8"), "13.0", "NVIDIA driver", "missing", "up to 12.8", "too old for torch's CUDA 13.0"),
        (smi(H100, cuda="13.2"), "12.8", "NVIDIA driver", "ok", "up to 13.2", ""),
        (smi(H100), None, "GPUs", "missing", "1 x NVIDIA H100", "CPU build"),
        (smi("Tesla T4, 15360, 570.86.15, 7.5, [N/A]"), "13.0", "GPUs", "warning", "Tesla T4", "8.0"),
        (smi("NVIDIA GB10, [N/A], 580.1, 12.1, [N/A]"), "13.0", "GPUs", "ok", "1 x NVIDIA GB10, [N/A]", ""),
        (smi(H100.replace("Disabled", "Enabled")), "13.0", "MIG", "warning", "enabled", "one slice"),
        (smi(), "13.0", "GPUs", "warning", "none", "enough for the demo"),
        ("echo Failed to initialize NVML; exit 18", "13.0", "GPUs", "missing", "Failed to initialize NVML", "driver"),
        (None, "13.0", "GPUs", "warning", "no NVIDIA driver", "enough for the demo"),
    ],
)
def test_gpus(
    tool: Callable,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    cuda: str,
    what: str,
    verdict: str,
    found: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(machine, "torch_cuda", lambda: cuda)
    if script:
        tool("nvidia-smi", script)
    row = rows(machine.gpus())[what]
    assert row.verdict == verdict and found in row.found and remedy in row.remedy
    assert bool(row.remedy) == (verdict != "ok")


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    code = "import sys, bifrost.trainer.doctor.software as d; print(d.torch_cuda(), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == [torch.stdout.strip(), "False"]


def test_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    changed = {"torch": "2.10.0", "tokenizers": None, "mlflow": None, "flash-attn": "2.8.3"}

    def version(name: str) -> str:
        if name in changed and changed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    assert {row.verdict for row in software.requirements()} == {"ok"}
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = rows([*software.requirements(), *software.optional()])
    assert found["torch"].verdict == "missing" and found["torch"].remedy == "pip install 'torch>=2.11'"
    assert found["tokenizers"].verdict == "missing" and found["tokenizers"].found == "not installed"
    assert found["mlflow"].verdict == "warning" and "not mirrored" in found["mlflow"].remedy
    assert found["flash-attn"].found == "2.8.3" and "other requirements" not in found


def test_a_python_that_nobody_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.python()[0].verdict == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    row = software.python()[0]
    assert row.verdict == "warning" and "3.10 to 3.13" in row.remedy


def test_tested_pythons_are_those_of_the_package() -> None:
    declared = [
        line.rpartition(" ")[2] for line in importlib.metadata.metadata("bifrost-train").get_all("Classifier") or []
    ]
    minors = sorted(int(each[2:]) for each in declared if each.startswith("3."))
    assert ((3, minors[0]), (3, minors[-1])) == software.PYTHONS


def test_package_data_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.package_data()[0].verdict == "ok"
    monkeypatch.setattr(software, "DATA", (*software.DATA, ("trainer/report", "lost.jinja")))
    row = software.package_data()[0]
    assert row.verdict == "missing" and row.found == "trainer/report/lost.jinja missing"


def test_compilers(tool: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: None)
    found = rows(machine.compilers())
    assert {found[name].verdict for name in ("C++ compiler", "C compiler", "ninja")} == {"warning"}
    assert "apt-get install g++" in found["C++ compiler"].remedy
    tool("g++", "echo 'g++ (Debian 12.2.0-14) 12.2.0'")
    tool("gcc", "exit 127")
    tool("ninja", "")
    tool("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    found = rows(machine.compilers())
    assert found["C++ compiler"] == Finding("C++ compiler", "g++ (Debian 12.2.0-14) 12.2.0")
    assert found["C compiler"].found == "gcc does not run" and found["nvcc"].found == "13.0" and "ninja" not in found


def port(root: Path, name: str, state: str, layer: str, rate: str) -> None:
    folder = root / "sys/class/infiniband" / name / "ports/1"
    folder.mkdir(parents=True)
    for file, text in (("state", state), ("link_layer", layer), ("rate", rate)):
        (folder / file).write_text(text + "\n")


def interface(root: Path, name: str, state: str, speed: str) -> None:
    folder = root / "sys/class/net" / name
    folder.mkdir(parents=True)
    (folder / "operstate").write_text(state)
    (folder / "speed").write_text(speed)


def test_fabric(tmp_path: Path) -> None:
    assert rows(machine.fabric(tmp_path))["InfiniBand, RoCE"].found.startswith("none")
    port(tmp_path, "mlx5_1", "2: INIT", "InfiniBand", "10 Gb/sec (4X SDR)")
    assert rows(machine.fabric(tmp_path))["InfiniBand, RoCE"].verdict == "missing"
    port(tmp_path, "mlx5_0", "4: ACTIVE", "InfiniBand", "400 Gb/sec (4X NDR)")
    port(tmp_path, "mlx5_2", "4: ACTIVE", "Ethernet", "200 Gb/sec (4X HDR)")
    interface(tmp_path, "ib0", "up", "400000")
    interface(tmp_path, "eth1", "down", "-1")
    first, second, net, _ = machine.fabric(tmp_path)
    assert first.found == "mlx5_0:1 InfiniBand 400 Gb/sec (4X NDR), mlx5_2:1 RoCE 200 Gb/sec (4X HDR)"
    assert (first.verdict, second.verdict) == ("ok", "warning") and "mlx5_1:1" in second.found
    assert net.found == "ib0 400 Gb/s"


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = folders.runs_folder(tmp_path / "not" / "yet")
    assert row.verdict == "ok" and "GiB free" in row.found and not list(tmp_path.iterdir())
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda folder: Usage(3 * 2**30))
    assert (
        folders.runs_folder(tmp_path)[0].verdict == "warning"
        and "free some space" in folders.runs_folder(tmp_path)[0].remedy
    )

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (row,) = folders.runs_folder(tmp_path)
    assert row.verdict == "missing" and "flock does not work there (No locks available)" in row.remedy
    (tmp_path / "file").touch()
    (row,) = folders.runs_folder(tmp_path / "file")
    assert row.verdict == "missing" and "writable" in row.remedy


class Usage:
    def __init__(self, free: int):
        self.free = free


def test_a_long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(folder))
    (row,) = folders.temporary()
    assert row.verdict == "warning" and "75 bytes" in row.remedy


def test_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = os.path.realpath(tmp_path)
    mounts = {"/": "ext4", f"{inner}/my home": "nfs4", f"{inner}/my": "tmpfs"}
    found = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts.items()]
    monkeypatch.setattr(folders.psutil, "disk_partitions", lambda all: found)
    assert folders.file_system(tmp_path / "my home" / "runs") == "nfs4 (shared)"
    assert folders.file_system(tmp_path / "my" / "runs") == "tmpfs"
    assert folders.file_system(tmp_path / "mystery") == "ext4"
    found.clear()
    assert folders.file_system(tmp_path) == "unknown file system"


def test_slurm(tool: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._slurm() == [Finding("Slurm", "not installed: start runs by hand")]
    tool("sbatch", "")
    assert doctor._slurm()[0].verdict == "warning" and "sacct" in doctor._slurm()[0].remedy
    for name in NEEDED:
        tool(name, "")
    tool("sinfo", "echo slurm 23.11.4")
    tool("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    assert doctor._slurm() == [Finding("Slurm", "slurm 23.11.4, the controller answers")]
    tool("scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    assert doctor._slurm()[0].verdict == "warning" and "does not answer" in doctor._slurm()[0].remedy
    tool("scontrol", "sleep 60")
    from bifrost.slurm import reachable

    monkeypatch.setattr(reachable.slurm_here, "__defaults__", (0.2,))
    begun = time.monotonic()
    assert "no answer within 0.2 s" in doctor._slurm()[0].remedy and time.monotonic() - begun < 5


class Answers(BaseHTTPRequestHandler):
    codes: dict[str, int] = {"/health": 200, "/closed/health": 401}  # noqa: RUF012

    def do_GET(self) -> None:
        self.send_response(self.codes.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_mlflow(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            uri = f"http://127.0.0.1:{server.server_port}"
            assert tracker.mlflow(tmp_path, uri + "/") == [Finding("MLflow", f"{uri}/ answers")]
            assert tracker.mlflow(tmp_path, f"{uri}/closed")[0].verdict == "warning"
            assert "is this MLflow's address" in tracker.mlflow(tmp_path, f"{uri}/other")[0].remedy
        finally:
            server.shutdown()
            thread.join()
    row = tracker.mlflow(tmp_path, uri)[0]
    assert row.verdict == "missing" and "Connection refused" in row.remedy
    row = tracker.mlflow(tmp_path, f"http://me:secret@127.0.0.1:{server.server_port}")[0]
    assert row.verdict == "missing" and "secret" not in "".join(row)
    for uri in ("http://h:5000/?token=secret", "https://secret@h", "postgresql://h/mlflow?user=a&password=secret"):
        row = tracker.mlflow(tmp_path, uri)[0]
        assert row.verdict == "missing" and "secret" not in "".join(row) and "in the address: set " in row.remedy
    for uri in ("postgresql://me:secret@h/mlflow", "mysql://h/mlflow?password=secret"):
        row = tracker.mlflow(tmp_path, None, uri)[0]  # from MLFLOW_TRACKING_URI, as a recipe with it is answered
        assert row.verdict == "ok" and "secret" not in "".join(row)
    assert tracker.mlflow(tmp_path, None)[0].verdict == "ok"
    assert tracker.mlflow(tmp_path, f"sqlite:///{tmp_path}/x/mlflow.db")[0].verdict == "ok"
    assert tracker.mlflow(tmp_path, "file:///old")[0].verdict == "warning"


def test_what_hangs_or_fails_is_a_row() -> None:
    held = threading.Event()

    def fails() -> list[Finding]:
        raise RuntimeError("broken\nsecond line")

    checks = [
        ("slow", lambda: [Finding("slow", str(held.wait(30)))]),
        ("ill", fails),
        ("well", lambda: [Finding("a", "b")]),
    ]
    begun = time.monotonic()
    slow, ill, well = finding.run_checks(checks, limit_s=0.3)
    assert time.monotonic() - begun < 5
    held.set()
    assert (slow.what, slow.verdict, slow.found) == ("slow", "warning", "no answer within 0.3 s")
    assert (ill.what, ill.verdict, ill.found) == ("ill", "warning", "RuntimeError: broken")
    assert well == Finding("a", "b")


def test_a_command_that_hangs_is_left(tool: Callable) -> None:
    tool("nvidia-smi", "sleep 60")
    assert finding.ask("nvidia-smi", limit_s=0.2) == "no answer within 0.2 s"


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    command = [sys.executable, "-m", "bifrost", "doctor", "--folder"]
    good, bad = (
        subprocess.run([*command, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for name in ("runs", "file")
    )
    assert good.returncode == 0 and good.stdout.splitlines()[-1].startswith("usable"), good.stdout + good.stderr
    assert bad.returncode == 2 and bad.stdout.splitlines()[-1] == "missing: runs"
    assert all(column in good.stdout for column in ("what", "found", "verdict", "what to do"))
