"""`make device`: order, limits, what an interrupted run keeps; and the page that its results are put into."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "benchmarks"))
import device  # noqa: E402
import device_parts  # noqa: E402

FIGURES = {"samples/s": 3}


def part(name: str, code: str, limit_s: float = 30) -> device_parts.Part:
    """A part that runs Python code, whose argument is the part's folder."""

    def command(context: device_parts.Context, folder: Path) -> list[str]:
        return [sys.executable, "-c", code, str(folder)]

    return device_parts.Part(name, limit_s, f"what {name} shows", command, lambda folder: FIGURES)


class Device:
    """The script with other parts, on a `kind` of device."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.kind = folder, monkeypatch, "cpu"
        monkeypatch.setattr(device, "device_kind", lambda context: self.kind)

    def run(self, *parts: device_parts.Part, budget: float = 60, words: tuple[str, ...] = ()) -> int:
        self.patch.setattr(device, "PARTS", parts)
        self.patch.setattr(device, "INSTALL", parts[0])
        return device.main([f"--budget={budget}", f"--folder={self.folder}", *words])

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "device.json").read_text())["parts"]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(tmp_path / "device", monkeypatch)


INSTALL = part("install", "pass")
APPEND = "import sys; open(sys.argv[1] + '/../order', 'a').write('{}')"


def test_parts_run_in_order_and_are_recorded_and_copied(script: Device, tmp_path: Path) -> None:
    parts = [INSTALL, *(part(name, APPEND.format(name)) for name in "abc")]
    assert script.run(*parts, words=(f"--out={tmp_path / 'copies'}",)) == 0
    assert (script.folder / "order").read_text() == "abc"
    assert [(name, found["state"], found["on"]) for name, found in script.results.items()] == [
        ("install", "done", "any"), ("a", "done", "cpu"), ("b", "done", "cpu"), ("c", "done", "cpu"),
    ]  # fmt: skip
    assert script.results["b"]["figures"] == FIGURES and script.results["b"]["shows"] == "what b shows"
    for name in ("device.json", "device.log"):
        assert (tmp_path / "copies" / name).read_bytes() == (script.folder / name).read_bytes()
    assert script.run(*parts) == 0
    assert (script.folder / "order").read_text() == "abcabc", "a complete run starts over"


def test_a_part_over_its_limit_ends_with_its_children_and_the_rest_runs(script: Device) -> None:
    child = "import subprocess, sys, time; file = open(sys.argv[1] + '/../pid', 'w')\n"
    child += "file.write(str(subprocess.Popen(['sleep', '60']).pid)); file.close(); time.sleep(60)"
    begun = time.monotonic()
    assert script.run(INSTALL, part("long", child, limit_s=8), part("short", "pass"), part("bad", "1/0")) == 1
    assert time.monotonic() - begun < 50
    found = script.results
    assert [found[name]["state"] for name in ("long", "short", "bad")] == ["timed out", "done", "failed"]
    assert found["long"]["reason"] == "not done within 8 s" and "exit code 1" in found["bad"]["reason"]
    process = Path("/proc") / (script.folder / "pid").read_text() / "stat"
    assert not process.exists() or process.read_text().split(")")[1].split()[0] == "Z"
    assert "ZeroDivisionError" in (script.folder / "device.log").read_text()


INTERRUPTED = """
import sys
sys.path[:0] = [{code!r}, {tests!r}]
import device, test_device
install, first = test_device.INSTALL, test_device.part("a", test_device.APPEND.format("a"))
sleep = "import os, sys, time; open(sys.argv[1] + '/../pid', 'w').write(str(os.getpid())); time.sleep(60)"
device.PARTS, device.INSTALL = (install, first, test_device.part("c", sleep)), install
device.device_kind = lambda context: "cpu"
device.main(["--folder={folder}"])
"""


def test_sigterm_ends_the_part_that_runs_and_keeps_the_others(script: Device) -> None:
    code = INTERRUPTED.format(
        code=str(ROOT / "docs" / "benchmarks"), tests=str(Path(__file__).parent), folder=script.folder
    )
    process, pid = subprocess.Popen([sys.executable, "-c", code]), script.folder / "pid"
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(50) == 1
    stat = Path("/proc") / pid.read_text() / "stat"
    assert not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z"
    assert {name: found["state"] for name, found in script.results.items()} == {"install": "done", "a": "done"}
    assert script.run(INSTALL, part("a", APPEND.format("a")), part("c", APPEND.format("c"))) == 0
    assert (script.folder / "order").read_text() == "ac", "a is not done again"


def test_a_run_with_a_failed_part_continues_there(script: Device) -> None:
    last = part("c", "import sys; sys.exit(1)")
    assert script.run(INSTALL, part("a", APPEND.format("a")), last) == 1
    assert script.run(INSTALL, part("a", APPEND.format("a")), part("c", APPEND.format("c"))) == 0
    assert (script.folder / "order").read_text() == "ac", "a is not done again"


def test_the_installation_is_repeated_for_another_checkout(script: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    install, failing = part("install", APPEND.format("i")), part("b", "1/0")
    for checkout in ("one", "one", "two"):
        monkeypatch.setattr(device, "fingerprint", lambda wheels, checkout=checkout: checkout)
        assert script.run(install, failing) == 1
    assert (script.folder / "order").read_text() == "ii"


def test_a_part_done_on_a_cpu_is_not_done_on_a_gpu(script: Device) -> None:
    a, failing = part("a", APPEND.format("a")), part("b", "1/0")
    assert script.run(INSTALL, a, failing) == 1
    script.kind = "cuda"
    assert script.run(INSTALL, a, failing) == 1
    assert (script.folder / "order").read_text() == "aa" and script.results["a"]["on"] == "cuda"


def test_parts_beyond_the_budget_are_recorded_as_not_run(script: Device) -> None:
    record = device.Record.open(script.folder, None)
    context = device_parts.Context(script.folder, script.folder, kind="cpu")
    device.run_part(part("long", "import time; time.sleep(60)"), context, record, time.monotonic() + 10)
    device.run_part(part("late", "pass"), context, record, time.monotonic() + device.MARGIN_S + device.LEAST_S - 0.1)
    assert script.results["long"]["state"] == "timed out" and script.results["long"]["limit_s"] <= 7
    assert script.results["late"] == {
        "shows": "what late shows", "state": "not run", "on": "cpu", "reason": "the budget is spent",
    }  # fmt: skip


def test_unknown_parts_are_refused(script: Device, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        script.run(INSTALL, words=("nonsense",))
    assert ended.value.code == 2 and "nonsense: known parts are install" in capsys.readouterr().err


def test_every_part_has_a_command_on_every_device(tmp_path: Path) -> None:
    """Of existing files; what they run is that of the product's own commands."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00000.tar").touch()
    for kind in ("cuda", "phantom", "cpu"):
        context = device_parts.Context(tmp_path, tmp_path, kind=kind)
        for each in device_parts.PARTS:
            command = each.command(context, tmp_path)
            assert isinstance(command, list), each.name
            files = [word for word in command if word.endswith(".py")]
            assert all((ROOT / file).is_file() for file in files), each.name
            assert (context.environment().get("TRITON_INTERPRET") == "0") == (kind == "cuda")
    assert sum(each.limit_s for each in device_parts.PARTS) / 2 < 540, "they should take half of their limits"


def test_only_wheels_of_packages_that_are_missing_are_installed(tmp_path: Path) -> None:
    for name in ("pytest", "no_such_package"):
        (tmp_path / f"{name}-1.0-py3-none-any.whl").touch()
    command = device_parts.install(device_parts.Context(tmp_path, tmp_path), tmp_path)
    assert [Path(word).name for word in command if word.endswith(".whl")] == ["no_such_package-1.0-py3-none-any.whl"]
    assert "--no-index" in command and "--no-deps" in command and str(ROOT) in command


def test_the_page_shows_no_figure_that_is_not_of_a_gpu() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_gpu.py"))
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text == made["page"](text, made["recorded"]()), "run python docs/make_gpu.py"
    results = {
        "device": "cpu",
        "date": "2026-01-01",
        "parts": {
            "machine": {"state": "done", "figures": {"machine": "NVIDIA H200", "GEMM, TFLOP/s": 700}},
            "loss": {"state": "timed out", "reason": "not done within 90 s"},
            "norm": {"state": "failed", "reason": "exit code 1", "figures": {"T=4096": 97, "T=8192": None}},
        },
    }
    on_cpu = made["measured"](results)
    assert "Nothing has been measured" in on_cpu and "700" not in on_cpu and on_cpu == made["measured"](None)
    on_gpu = made["measured"]({**results, "device": "cuda"})
    assert on_gpu.startswith("NVIDIA H200, 2026-01-01.") and "GEMM, TFLOP/s 700" in on_gpu
    assert "| timed out: not done within 90 s |" in on_gpu and "| T=4096 97; failed: exit code 1 |" in on_gpu
    assert "| not measured |" in on_gpu
