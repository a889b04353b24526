"""The profile of a step: kinds of work, idle time, and a real run."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

import ranked
import runs
from bifrost.trainer.bench.profile import kind_of, table, works


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("pointer_kernel", "head and loss"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element-wise"),
        ("bifrost.forward", "host"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def kernel(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA,
        is_user_annotation=False,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=1e9,
    )


def test_idle_time_is_what_no_kernel_covers() -> None:
    """Two overlapping streams and two gaps: 10 to 20, and 40 to 45."""
    rows = works([kernel("gemm", 0, 10), kernel("add", 20, 30), kernel("gemm", 25, 40), kernel("add", 45, 50)])
    assert {row.name: row.microseconds for row in rows} == {"gemm": 25, "add": 15, "idle": 15}
    text = table(rows, steps=1)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["GEMM", "element-wise", "idle"]


@pytest.mark.multi
def test_a_run_is_profiled_and_leaves_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    settings = runs.arguments(shards, tmp_path / "runs")[2:]
    out = tmp_path / "profile"
    ended = ranked.bifrost(2, "kernels", "profile", "tiny-mllm", *settings, "--steps=1", f"--out={out}")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert sorted(file.name for file in out.iterdir()) == ["profile.txt", "trace.json.gz"]
    assert not (tmp_path / "runs").exists()
    text = (out / "profile.txt").read_text()
    shares = dict(line.rsplit(None, 2)[::2] for line in text.split("\n\n")[0].splitlines()[1:])
    assert {"GEMM", "attention", "communication", "element-wise", "host"} <= shares.keys()
    assert sum(float(share.rstrip("%")) for share in shares.values()) == pytest.approx(100, abs=1)
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"bifrost.forward", "bifrost.backward", "bifrost.optimizer", "bifrost.exchange", "aten::mm"} <= names
