"""The benchmark: counts, errors and output. CPU times are marked as such, and Triton is not timed on a CPU."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bifrost.kernels.bench import __main__ as bench
from bifrost.kernels.bench import cases, loss, measure
from bifrost.kernels.bench.arguments import read_arguments
from bifrost.kernels.bench.attention import attention_problem, attention_work, text_lengths
from bifrost.kernels.bench.cases import Shape, gather_norm_work, mask_mix_work
from bifrost.kernels.bench.loss import latent_loss_work
from bifrost.kernels.bench.measure import Clock, Timing
from bifrost.kernels.bench.report import (
    COLUMNS,
    LIGER_COLUMNS,
    NOT_A_GPU,
    Environment,
    Row,
    below,
    best,
    records,
    upsert,
    verdicts,
)

CPU = torch.device("cpu")
SMALL = ["--tokens", "256", "--width", "128", "--rep", "1"]


@pytest.fixture(autouse=True)
def no_compile_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a separate test, which takes most of a minute."""
    monkeypatch.setattr(bench, "compile_table", lambda: print("compile table"))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(**changes) -> Row:
    made = Row(
        kernel="latent-loss", provider="triton", baseline=False, mode="full", shape=cases.SHAPES["7b"],
        tokens=16384, dtype="bf16", timing=Timing(2.0, 1.9, 2.2), floor_ms=1.9, flops=10**12, bytes=10**9,
        peak=30, error=1e-3, over_eager=1.35, over_compile=1.05, config="", clocks="", details={},
    )  # fmt: skip
    return replace(made, **changes)


ENVIRONMENT = Environment("CPU (planted), no GPU", False, "0123456789ab", "bf16", 1.0, 10.0)


def test_rates_and_percentage_of_the_floor() -> None:
    """10^12 FLOPs and 10^9 bytes in 2 ms are 500 TFLOP/s and 500 GB/s; a floor of 1.9 ms is 95 %."""
    made = row()
    assert made.tflops == pytest.approx(500)
    assert made.gbps == pytest.approx(500)
    assert made.percent == pytest.approx(95)


def test_work_of_the_latent_loss() -> None:
    """6 T D^2 FLOPs. A GEMM moves two [T, D] and one [D, D]; the target is one more [T, D]."""
    work = latent_loss_work(8192, 2048, 2)
    assert work["full"].flops == 6 * 8192 * 2048**2 == 206_158_430_208
    assert work["backward"].flops == 2 * work["forward"].flops == 2 * work["no-grad"].flops
    rows, square = 8192 * 2048 * 2, 2048 * 2048 * 2
    assert work["full"].bytes == 7 * rows + 3 * square == 260_046_848
    assert work["forward"].bytes - work["no-grad"].bytes == rows  # the residual


@pytest.mark.parametrize(("width", "low", "high"), [(2048, 880, 1010), (3584, 1390, 1760)])
def test_intensity_of_the_three_gemms(width: int, low: int, high: int) -> None:
    """FLOP / byte from 8k to 128k tokens with dW in fp32, computed independently of this code."""
    for tokens, expected in ((8 * 1024, low), (128 * 1024, high)):
        work = latent_loss_work(tokens, width, 2)["full"]
        gemms = work.bytes - tokens * width * 2 + 2 * width**2
        assert work.flops / gemms == pytest.approx(expected, rel=0.01)


def test_work_of_the_memory_bound_kernels() -> None:
    mix = mask_mix_work(512, 200, 64, 2)
    # 312 visible rows read, 512 written, a byte of mask each, table of 256 rows, the token
    assert mix["forward"].bytes == (312 + 512 + 256 + 1) * 128 + 512
    assert mix["backward"].bytes == (512 + 256 + 1) * 128 + 512
    norm = gather_norm_work(512, 256, 64, 2)
    assert norm["forward"].bytes == (256 + 256 + 1) * 128 + 256 * 8
    assert norm["backward"].bytes == (256 + 256 + 512 + 2) * 128 + 256 * 8


def test_work_of_attention() -> None:
    """One image of 256 patches after 128 text tokens, 28 heads of 128: 1.4 GFLOP forward."""
    work = attention_work([128], 28, 4, 2)
    image = 4 * 256 * 384 * 3584
    assert work["forward"].flops == image + 2 * 128**2 * 3584
    assert work["backward"].flops == 2.5 * image
    assert work["forward"].bytes == 2 * 128 * (384 * 2 * (28 + 4))
    assert all(16 <= length <= 240 for length in text_lengths(64))


def test_all_attention_layouts_compute_the_same_function() -> None:
    """Packed in two calls, and padded with the hybrid mask: both agree in fp32 with fp64, with text and gradients."""
    problem = attention_problem(Shape("", 256, 2, 1), 512, torch.float32, CPU, lambda name: name != "compile")
    exact = problem.exact()
    assert [len(exact), *exact[0].shape] == [5, 512, 2, 128]
    found = {c.provider: max(measure.errors(c, exact)) for c in problem.candidates}
    assert found.keys() == {"eager", "sdpa-dense", "sdpa", "reference"}
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("kernel", bench.BUILDERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_candidates_agree_with_fp64(kernel: str, dtype: str) -> None:
    wanted = {"eager", "reference", "sdpa"}
    kind = bench.DTYPES[dtype]
    problem = bench.BUILDERS[kernel](Shape("", 128, 1, 1), 256, kind, CPU, wanted.__contains__)
    exact = problem.exact()
    assert all(x.dtype == torch.float64 for x in exact)
    for candidate in problem.candidates:
        assert max(measure.errors(candidate, exact)) < {"bf16": 1e-2, "fp32": 1e-5}[dtype]


def test_every_backward_pass_has_its_own_graph() -> None:
    problem = bench.BUILDERS["latent-loss"](Shape("", 64, 0, 1), 32, torch.float32, CPU, lambda name: name == "eager")
    prepare, run = measure.steps(problem.candidates[0], "backward")
    first = prepare()
    run(first)
    with pytest.raises(RuntimeError, match="second time"):
        run(first)
    run(prepare())


def test_forward_pass_is_outside_the_timed_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake device: prepare, flush the cache, then only the timed part between the events."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, other: object) -> float:
            return 4.0

    class Driver:
        def get_empty_cache_for_benchmark(self) -> str:
            return "cache"

        def clear_cache(self, cache: str) -> None:
            happened.append(cache)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(measure.triton.runtime.driver, "_active", Driver())
    found = measure.timed(
        lambda: happened.append("prepare"), lambda _: happened.append("run"), torch.device("cuda"), 40, split=True
    )
    assert found == Timing(4.0, 4.0, 4.0)
    assert happened == ["prepare", "cache", "event", "run", "event"] * 13  # three for warmup, ten in 40 ms


@pytest.mark.parametrize(
    ("found", "is_wrong"), [([0.02, 0.0], False), ([0.02 + 2 * 2**-8, 0.0], True), ([math.nan, 0.0], True)]
)
def test_error_limit_is_twice_eagers_error(found: list[float], is_wrong: bool) -> None:
    assert measure.wrong(found, [0.01, 0.0], torch.bfloat16) is is_wrong


def test_cpu_run_marks_every_row(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = [tmp_path / "new" / name for name in ("bench.csv", "bench.json")]
    files = ["--csv", str(out[0]), "--json", str(out[1]), "--plots", str(tmp_path / "plots"), "--fail-below", "99"]
    assert bench.main([*SMALL, *files]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(tuple(bench.BUILDERS)) and " D=128 " in line]
    assert len(table) == 4 * (2 + 4 + 1 + 1)  # modes x (eager, reference; four of attention; eager; eager)
    assert all(line.endswith(NOT_A_GPU) for line in table)
    assert next(line for line in printed.splitlines() if line.startswith("kernel ")).endswith(NOT_A_GPU)
    assert not any(" triton" in line for line in table)
    assert "--fail-below is ignored" in printed and "compile table" in printed
    with out[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table)
    assert all(r["gpu_name"].startswith("CPU (") and r["gpu_name"].endswith("no GPU") for r in rows)
    assert {r["kernel_operation_mode"] for r in rows} == {"forward", "backward", "full", "no-grad-forward"}
    assert all(r["metric_name"] == "speed" and float(r["y_value_20"]) <= float(r["y_value_80"]) for r in rows)
    written = json.loads(out[1].read_text())
    assert written["note"] == NOT_A_GPU and len(written["rows"]) == len(rows)
    if (tmp_path / "plots").exists():  # matplotlib need not be installed
        names = {path.name for path in (tmp_path / "plots").iterdir()}
        assert names == {*(f"{kernel}.png" for kernel in bench.BUILDERS), "roofline.png"}


def test_missing_matplotlib_is_reported(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    arguments = ["--kernel", "mask-mix", "--mode", "no-grad", "--plots", str(tmp_path / "plots")]
    assert bench.main([*SMALL, *arguments]) == 0
    assert "no plots: matplotlib" in capsys.readouterr().out


def test_columns_begin_with_those_of_liger() -> None:
    assert ",".join(LIGER_COLUMNS) == (
        "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
        "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,liger_version"
    )
    assert ",".join(COLUMNS[len(LIGER_COLUMNS) :]) == (
        "flops,bytes,tflops,gbps,pct_of_measured_floor,error_vs_fp64,config,commit,torch_version,triton_version,clocks"
    )
    speed, memory = records([row()], ENVIRONMENT)
    assert tuple(speed) == tuple(memory) == COLUMNS
    assert (speed["metric_unit"], memory["metric_unit"]) == ("ms", "MB")
    assert float(speed["pct_of_measured_floor"]) == pytest.approx(95)


def test_upsert_replaces_only_the_same_measurement(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    slow, other = row(peak=None), row(peak=None, tokens=8192)
    upsert(path, records([slow, other], ENVIRONMENT))
    upsert(path, records([replace(slow, timing=Timing(1.0, 1.0, 1.0))], ENVIRONMENT))
    upsert(path, records([slow], replace(ENVIRONMENT, gpu="another")))
    header, *lines = path.read_text().splitlines()
    assert header == ",".join(COLUMNS)
    found = list(csv.DictReader([header, *lines]))
    assert [(r["gpu_name"], r["x_value"], r["y_value_50"]) for r in found] == [
        (ENVIRONMENT.gpu, "16384", "1.0"),
        (ENVIRONMENT.gpu, "8192", "2.0"),
        ("another", "16384", "2.0"),
    ]


def test_file_of_liger_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "all_benchmark_data.csv"
    path.write_text(",".join(LIGER_COLUMNS) + "\nrms_norm,liger,full,speed,ms,H,hidden,1024,1,1,1,{},A GPU,then,0.8\n")
    upsert(path, records([row()], ENVIRONMENT))
    first, *rest = csv.DictReader(path.open(newline=""))
    assert (first["kernel_name"], first["liger_version"], first["flops"]) == ("rms_norm", "0.8", "")
    assert len(rest) == 2


def test_wrong_provider_is_detected_and_not_timed(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.patch_latent_loss

    def planted(*args):
        loss, squares = right(*args)
        return loss * 1.05, squares

    monkeypatch.setattr(loss, "patch_latent_loss", planted)
    assert bench.main([*SMALL, "--kernel", "latent-loss", "--mode", "full"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "reference has error" in line] == ["WRONG"]
    assert [line.split()[4] for line in lines if line.startswith("latent-loss D=")] == ["eager"]


def test_failure_of_our_provider_fails_the_run(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*args):
        raise RuntimeError("misaligned address\nand a trace")

    monkeypatch.setattr(loss, "patch_latent_loss", planted)
    assert bench.main([*SMALL, "--kernel", "latent-loss", "--mode", "full"]) == 1
    assert "reference failed: misaligned address\n" in capsys.readouterr().out


def test_below_reports_sizes_at_which_the_fastest_is_too_slow() -> None:
    rows = [
        row(),
        row(provider="in-place", timing=Timing(2.5, 2.5, 2.5)),  # slower than ours at the same size
        row(provider="compile", baseline=True, timing=Timing(1.0, 1.0, 1.0)),
        row(mode="forward", floor_ms=0.1),
        row(kernel="mask-mix", floor_ms=1.2),
    ]
    assert [r.provider for r in best(rows)] == ["triton", "triton"]
    assert below(rows, 60) == []
    (text,) = below(rows, 90)
    assert text.startswith("mask-mix 7b D=3584 16384 tokens: triton reaches 60.0 %")
    assert len(below(rows, 99)) == 2


def test_verdicts_use_the_worst_size() -> None:
    eager = {"provider": "eager", "baseline": True, "timing": Timing(2.7, 2.7, 2.7), "peak": 100}
    rows = [row(), row(**eager), row(tokens=65536, floor_ms=1.99, over_compile=0.99), row(tokens=65536, **eager)]
    found = {v.target.split(" from")[0]: v for v in verdicts(rows)}
    assert found["at least 95 % of the floor"].holds
    assert not found["never slower than torch.compile"].holds
    assert "65536" in found["never slower than torch.compile"].measured
    assert found["at least 1.3x eager at D=3584"].holds
    assert "at least 1.55x eager at D=2048" not in found
    assert found["peak memory at most a third of eager's"].holds
    assert not verdicts([row(peak=34), row(**eager)])[-1].holds


@pytest.mark.parametrize(("limit", "code"), [("90", 0), ("96", 1)])
def test_limit_sets_the_exit_code_on_a_gpu(capsys, monkeypatch: pytest.MonkeyPatch, limit: str, code: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "device_name", lambda device: "planted GPU")
    monkeypatch.setattr(measure, "roofline", lambda dtype, device, rep: (700.0, 4000.0))
    monkeypatch.setattr(bench, "clock", lambda device: Clock(1980, 40))
    monkeypatch.setattr(bench.Run, "measure", lambda self, after: self.rows.append(row()))
    assert bench.main(["--fail-below", limit]) == code
    printed = capsys.readouterr().out
    assert ("BELOW: latent-loss 7b D=3584 16384 tokens" in printed) == bool(code)
    assert "target" in printed and NOT_A_GPU not in printed and "compile table" not in printed


def test_clock_drift() -> None:
    assert measure.drift(Clock(1980, 40), Clock(1800, 70)) == pytest.approx(0.0909, abs=1e-4)
    assert measure.drift(None, Clock(1800, 70)) == 0
    assert measure.clock(CPU) is None


@pytest.mark.parametrize(
    "arguments",
    [
        "--kernel nope", "--model 13b", "--model 3b --width 256", "--width 100", "--width 72 --kernel attention",
        "--tokens many", "--tokens 0", "--tokens 300", "--mode sideways", "--provider nope", "--dtype fp8",
        "--kernel mask-mix --provider reference", "--rep 0", "--fail-below 90 --mode forward", "--unknown",
        "--csv .", "--csv README.md",
    ],
)  # fmt: skip
def test_invalid_argument_is_one_line_and_code_2(
    arguments: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# no table\n")
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_sizes_are_in_units_of_1024() -> None:
    plan = read_arguments(["--tokens", "8k,300,16k", "--kernel", "latent-loss"], CPU)
    assert plan.tokens == [300, 8192, 16384]
    plan = read_arguments([], torch.device("cuda"))
    assert [shape.width for shape in plan.shapes] == [2048, 3584] and plan.tokens[-1] == 131072
    assert "compile" in plan.providers


def test_command_forwards_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from bifrost.trainer.cli import kernels, main

    seen = []
    monkeypatch.setattr(kernels, "run_child", lambda *arguments: seen.append(arguments) or 2)
    ended = CliRunner().invoke(main.app, ["kernels", "bench", "--kernel", "nope", "--rep", "1", "--help"])
    assert ended.exit_code == 2
    assert seen == [("bifrost.kernels.bench", "--kernel", "nope", "--rep", "1", "--help")]
