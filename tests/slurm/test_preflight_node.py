"""Checks of one node alone: folders, GPUs by nvidia-smi, and a laptop without Slurm."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from bifrost.data import retry
from bifrost.slurm.preflight import Limits, devices, fabric, find_rank_info, preflight, runner, smi
from bifrost.slurm.preflight.node import _folder, _recipe, node_checks
from bifrost.slurm.preflight.verdict import decide

SINGLE = """
import os, sys
from pathlib import Path
from bifrost.data import retry
from bifrost.slurm.preflight import Limits, find_rank_info, preflight
run = Path(sys.argv[1]) if len(sys.argv) > 1 else None
limits = Limits(free_gib=0.01, scratch_gib=0.01, inodes=1)
code = preflight(run, find_rank_info({}), limits=limits)
sys.stdout.flush()
os._exit(code)
"""


def single_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SINGLE, *arguments], capture_output=True, text=True, timeout=300)


def test_a_laptop(tmp_path: Path) -> None:
    done = single_process()
    assert done.returncode == 0, done.stderr
    assert "all-reduce" in done.stdout and " passes" in done.stdout
    (tmp_path / "recipe.yaml").write_text("stage: patch-latents")
    done = single_process(str(tmp_path))
    assert done.returncode == 2, "invalid recipe"
    assert "recipe" in done.stdout.splitlines()[-1] and not (tmp_path / "excluded.json").exists()
    assert len(list((tmp_path / "preflight").glob("*/verdict.json"))) == 1


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _folder("run folder", tmp_path, 0.001, 1).reason == ""
    assert not os.listdir(tmp_path)
    assert "GiB free, 1e+09 required" in _folder("run folder", tmp_path, 1e9, 1).reason
    assert "inodes free" in _folder("run folder", tmp_path, 0.001, 2**60).reason
    assert "not a folder" in _folder("run folder", tmp_path / "none", 0, 0).reason
    # Not writable, not even by root.
    assert "cannot be written" in _folder("run folder", Path("/proc"), 0, 0).reason


def test_a_missing_shard_is_named_and_no_secret_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    (tmp_path / "recipe.yaml").write_text(
        "{stage: patch-latents, name: x, steps: 1, global_batch: 1, micro_batch: 1, backbone: {path: 'builtin:tiny'},"
        f" data: {{shards: '{tmp_path}/train-{{00000..00002}}.tar'}}}}"
    )
    found = [f for _, check in node_checks(find_rank_info({}), tmp_path, (), None, Limits()) for f in check()]
    data = next(finding for finding in found if finding.check == "data")
    assert data.reason == f"{tmp_path}/train-00000.tar: No such file or directory; check the path"
    assert "hush" not in str(found)


def test_a_folder_as_shards(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar", "notes.txt"):
        (tmp_path / name).touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{stage: patch-latents, name: x, steps: 1, global_batch: 1, micro_batch: 1, backbone: {path: 'builtin:tiny'},"
        f" data: {{shards: '{tmp_path}'}}}}"
    )
    data = next(finding for finding in _recipe(tmp_path) if finding.check == "data")
    assert data.figure.startswith("2 shards (")


@pytest.mark.parametrize("check", ["recipe", "data", "temp"])
def test_a_storage_error_is_not_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    for name in ("shards", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    (tmp_path / "recipe.yaml").write_text(
        "{stage: patch-latents, name: x, steps: 1, global_batch: 1, micro_batch: 1, backbone: {path: 'builtin:tiny'},"
        f" data: {{shards: '{tmp_path}/shards'}}}}"
    )
    failing = {"recipe": "slurm/recipe.yaml", "data": "shards", "temp": "scratch"}[check]
    asked = os.stat

    def stat(path: object = ".", *arguments: object, **options: object) -> os.stat_result:
        if str(path) == str(tmp_path / failing):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return asked(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    folder = [] if check != "temp" else [_folder("temp", tmp_path / "scratch", 0, 0)]
    found = next(each for each in (*folder, *_recipe(tmp_path)) if each.check == check)
    assert (
        found.reason
        == f"{tmp_path / failing}: Stale file handle; check the storage or the network; another attempt may succeed"
    )


def test_a_missing_path_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "{stage: patch-latents, name: x, steps: 1, global_batch: 1, micro_batch: 1, backbone: {path: 'builtin:tiny'},"
        f" runs_dir: {tmp_path}, init_from: {tmp_path}/gone, data: {{shards: '{tmp_path}/0.tar'}}}}"
    )
    (found,) = _recipe(tmp_path)
    assert (found.check, found.reason) == ("recipe", f"init_from={tmp_path}/gone: no such file or folder")


SMI = """#!/bin/sh
case "$1" in
  *memory.used*) {memory} ;;
  *ecc*) {ecc} ;;
  *max.sm*) printf '1980\\n1980\\n' ;;
  *clocks.sm*) printf '345\\n345\\n' ;;
  *{named}_reasons*) {throttle} ;;
  *name*) printf 'NVIDIA H200\\nNVIDIA H200\\n' ;;
  nvlink) {links} ;;
esac
"""


def status(*gpus: str) -> str:
    """Output of `nvidia-smi nvlink --status`; link states by letter: u(p), h(alf), d(own), s(leeping)."""
    words = {"u": "26.562 GB/s", "h": "13.281 GB/s", "d": "<inactive>", "s": "<sleep>"}
    lines = []
    for number, links in enumerate(gpus):
        lines.append(f"GPU {number}: NVIDIA H200 (UUID: GPU-00{number})")
        lines += [f"\t Link {index}: {words[state]}" for index, state in enumerate(links)]
    return "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines)


FINE = {
    "named": "clocks_event",
    "links": status("uu", "uu"),
    "memory": "printf '3\\n3\\n'",
    "ecc": "printf '0\\n0\\n'",
    "throttle": "printf '0x01\\n0x04\\n'",
}


@pytest.mark.parametrize(
    ("fault", "check", "reason"),
    [
        ({}, None, ""),
        ({"memory": "printf '3\\n9000\\n'"}, "GPU memory", "GPU 1 has 8.8 GiB in use"),
        ({"ecc": "printf '0\\n2\\n'"}, "GPU ECC", "GPU 1 has 2 uncorrected"),
        ({"ecc": "printf '[N/A]\\n[N/A]\\n'"}, None, ""),
        ({"ecc": "echo 'Field \"ecc\" is not a valid field to query.'; exit 2"}, None, ""),
        (
            {"throttle": "printf '0x01\\n0x48\\n'"},
            "GPU clocks",
            "GPU 1 is slowed by hardware slowdown, heat (hardware)",
        ),
        (
            {"named": "throttle", "throttle": "printf '0x01\\n0x20\\n'"},
            "GPU clocks",
            "GPU 1 is slowed by heat (driver)",
        ),
        ({"links": status("uu", "ud")}, "NVLink", "GPU 1 has 1 links (27 GB/s), GPU 0 2 (53 GB/s)"),
        ({"links": status("hu", "uu")}, "NVLink", "GPU 0 has 2 links (40 GB/s)"),
        ({"links": status("dd", "dd")}, "NVLink", "no link of any GPU is up, NVIDIA H200 has NVLink"),
        ({"links": status("", "")}, "NVLink", "no link of any GPU is up"),
        ({"links": status("ss", "ss")}, None, ""),
        ({"links": "echo 'ERROR: Option nvlink is not recognized.'; exit 2"}, None, ""),
        ({"memory": "echo 'GPU is lost. Reboot the system.'; exit 15"}, "GPU health", "GPU is lost"),
        ({"memory": "sleep 60"}, "GPU health", "does not answer"),
    ],
)
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict, check: str | None, reason: str) -> None:
    """A stand-in for nvidia-smi with the outputs that its manual describes."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI.format(**{**FINE, **fault}))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(smi, "PATIENCE_S", 1)
    found = devices.device_findings(2, 2.0)
    bad = {finding.check: finding.reason for finding in found if finding.reason}
    assert list(bad) == ([check] if check else []) and reason in str(bad)
    if "ecc" in fault and check is None:
        assert {f.check: f.figure for f in found}["GPU ECC"] == "not readable"


LISTED = """
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaa-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-111-1)
  MIG 3g.40gb     Device  1: (UUID: MIG-111-2)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbb-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-222-1)
"""


@pytest.mark.parametrize(
    ("visible", "asked"),
    [
        (None, ""),
        ("", ""),
        ("0,1", "--id=0,1"),
        ("GPU-bbb", "--id=GPU-bbb-2"),
        ("MIG-111-2,MIG-111-1", "--id=GPU-aaa-1"),
        ("MIG-GPU-bbb-2/1/0", "--id=GPU-bbb-2"),
        ("1,GPU-aaa-1", "--id=1,GPU-aaa-1"),
        # Not a GPU: all GPUs are queried.
        ("NoDevFiles", ""),
    ],
)
def test_gpus_that_nvidia_smi_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str
) -> None:
    """nvidia-smi refuses the UUID of a MIG instance, and an abbreviated one."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncase $1 in -L) cat <<'END'{LISTED}END\n;; *) echo $3;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ",".join(smi._chosen()) == asked.removeprefix("--id=")
    assert smi.query("memory.used") == ([asked.split(",")[0]] if asked else [])


def test_fewer_gpus_than_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert devices.device_findings(8, 2.0)[0].reason == "7 GPUs usable, 8 requested"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [finding.reason for finding in devices.device_findings(None, 2.0)] == [""]


def test_gpus_bound_to_tasks_are_not_a_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    task = {"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_TASK": "1"}
    me = find_rank_info(task)
    (finding,) = devices.device_findings(me.devices, 2.0, me.bound)
    assert "--gpus-per-task" in finding.reason and "sees 1 of its node's 2 GPUs" in finding.reason
    assert decide({"node1": [finding]}, in_job=True).code == 2, "a setting to fix, not a bad node"
    for other in ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, {"SLURM_GPU_BIND": "single:1"}):
        assert find_rank_info(other).bound
    assert not find_rank_info({"SLURM_TRES_PER_TASK": "cpu=4", "SLURM_GPU_BIND": "none"}).bound


@pytest.mark.parametrize("gpus", [True, False])
def test_every_rank_of_a_node_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, gpus: bool) -> None:
    """Two nodes with two ranks each: the device on which preflight joins the process group."""
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(runner._Session, "check_node", lambda *_: [])

    def join(session: runner._Session, _: object) -> int:
        session.wire.join(HashStore(), session.me.rank, session.me.size)
        asked.append(f"{session.me.rank} {session.wire.device}")
        return 0

    monkeypatch.setattr(runner._Session, "multi_node", join)
    for rank in range(4):
        task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}
        # LOCAL_RANK and RANK may be left over, for example from torchrun.
        preflight(None, find_rank_info({**task, "LOCAL_RANK": "0", "RANK": "0"}))
    on_gpus = ["cuda:0", "0 cuda:0", "cuda:1", "1 cuda:1", "cuda:0", "2 cuda:0", "cuda:1", "3 cuda:1"]
    assert asked == (on_gpus if gpus else ["0 cpu", "1 cpu", "2 cpu", "3 cpu"])


def test_rank_info_of_a_task() -> None:
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "1",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "16",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
        "SLURMD_NODENAME": "gpu008",
        "SLURM_GPUS_ON_NODE": "8",
    }
    me = find_rank_info(task)
    assert (me.node, me.rank, me.size, me.leader) == ("gpu008", 9, 16, False)
    assert (me.nodes, me.host, me.name) == (("gpu007", "gpu008"), "gpu007", "7-2-1")
    assert me.in_job and me.devices == 8 and not find_rank_info({}).in_job
    assert json.dumps(me.name)


def test_measuring_a_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU as stand-in: figures follow from FLOPs and bytes, and a product that changes is detected."""
    for name, answer in {"is_available": True, "get_device_name": "A GPU", "set_device": None}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, answer=answer: answer)
    wire = fabric.Wire(1)
    assert str(wire.device) == "cuda:1"
    wire.device = torch.device("cpu")
    monkeypatch.setattr(fabric, "PRODUCT", 64)
    monkeypatch.setattr(fabric, "COPY", 1000)
    monkeypatch.setattr(fabric.Wire, "synchronize", lambda self: None)
    monkeypatch.setattr(fabric.Wire, "_best", lambda self, work: work() is None or 1e-6)
    out = fabric.Outcome()
    wire.measure_gpu(out)
    assert (out.device, out.wrong_products) == ("A GPU", False)
    assert out.product_tflops == pytest.approx(2 * 64**3 * 1e-6) and out.copy_gb_s == pytest.approx(2.0)
    monkeypatch.setattr("torch.equal", lambda *_: False)
    wire.measure_gpu(out)
    assert out.wrong_products
    assert fabric.Outcome.of(out.plain()) == out, "round trip through JSON"
