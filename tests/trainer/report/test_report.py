"""The page of a run and the comparison of several, read back by Python's own HTML parser."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import ranked
import runs
from bifrost.recipes import load_recipe
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.report.drawing import Curve, chart
from bifrost.trainer.report.files import open_run
from bifrost.trainer.report.page import page
from bifrost.trainer.report.series import Series
from bifrost.trainer.report.timeline import Interval, intervals

VOID = {"meta", "img", "link", "br", "hr", "input"}
SECTIONS = ["curves", "time", "trouble", "checkpoints", "samples", "ranks", "settings", "environment"]


class Page(HTMLParser):
    """Checks that every element is closed in order; collects the text, its sections, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.loads: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        named = dict(attrs)
        if tag == "section" and named.get("id"):
            self.sections[named["id"] or ""] = ""
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if "section" in self.open and self.sections:
                self.sections[list(self.sections)[-1]] += data


def read(html: str) -> Page:
    """The page, when it needs nothing from elsewhere."""
    found = Page(html)
    assert all(address.startswith(("data:image/", "#")) for address in found.loads), found.loads
    assert not re.search(r"@import|url\((?!#)|<script|<link", html)
    assert html.startswith("<!DOCTYPE html>") and 'name="viewport"' in html
    return found


T = 1_780_000_000.0


def line(step: int, **rest: object) -> dict:
    return {
        "time": T + 20 + 2 * step,
        "step": step,
        "batch": step,
        "samples": 8 * step,
        "loss": 1 + 4 / step,
        "loss_masked": 1.1 + 4 / step,
        "grad_norm": 3 / step,
        "lr": 1e-4 * step,
        "samples_per_s": 4.0,
        "tokens_per_s": 200.0,
        "step_s": 2.0,
        "data_wait_s": 0.5,
        "tflops_per_device": 350.0,
        "mfu": 0.354,
        "hfu": 0.4,
        "peak_memory_gib": 100.0,
        "memory_headroom_gib": 20.0,
        "slowest_rank": 1,
        "skipped_steps": 0,
        "data_digest": f"{step:016x}",
        "ettr": 0.6,
        **rest,
    }


def make(folder: Path, records: list[dict], *overrides: str) -> Path:
    """A run folder with these lines of metrics."""
    folder.mkdir(parents=True)
    recipe = load_recipe("tiny-mllm", [f"name={folder.name}", "steps=100", *overrides])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    environment = {"ranks": 2, "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "hosts": ["ranks 0-1  n7  2"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def start(at: float, step: int, **rest: float) -> dict:
    return {"time": T + at, "event": "start", "step": step, "ranks": 2, "micro_batch": 2, "startup_s": 20.0, **rest}


@pytest.fixture
def eventful(tmp_path: Path) -> Path:
    """Killed at step 14, resumed from step 10, and running."""
    lost = {"downtime_s": 12.0, "kept_s": 0.0, "lost_s": 8.0, "lost_steps": 4}
    records = [
        start(20, 0, downtime_s=0.0, kept_s=0.0, lost_s=0.0, lost_steps=0),
        *(line(step) for step in range(1, 11)),
        {"time": T + 41, "event": "checkpoint", "step": 10, "seconds": 3.0, "blocked_s": 1.0, "bytes": 2**31},
        start(80, 10, **lost),
        *(line(step, time=T + 60 + 2 * step) for step in range(11, 41)),
        {
            "time": T + 120,
            "event": "skipped_step",
            "step": 30,
            "reason": "loss is <spike> & more",
            "loss": 9.0,
            "grad_norm": None,
        },
        {
            "time": T + 121,
            "event": "bad_samples",
            "step": 31,
            "samples": [["a/7", "cannot be decoded"], ["a/8", "torn"]],
        },
        {"time": T + 130, "event": "rollback", "step": 35, "to": 30, "skipped_batches": [31, 35], "lost_steps": 0},
    ]
    run = make(tmp_path / "eventful", records, "optimizer.lr=2e-4", "tracking.uri=http://tracker")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("http://", "http://me:secret@"))  # as older versions took it
    (run / "lock.json").write_text(json.dumps({"beat": T + 150}))
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    (run / "previews").mkdir()
    for step in range(1, 6):
        Image.new("RGB", (2000, 10 * step), "red").save(run / "previews" / f"step-{step:08d}.png")
    (run / "previews" / "step-00000006.png").write_bytes(b"torn")
    (run / "excluded.json").write_text(json.dumps({"n3": {"times": 2, "last": T, "reason": "ECC errors"}}))
    (run / "slurm").mkdir()
    jobs = [
        {"time": T, "attempt": "17.0", "hosts": "n[7-8]"},
        {"time": T + 50, "attempt": "17.0", "code": 76, "reason": "hung"},
    ]
    (run / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return run


def test_a_page_has_it_all(eventful: Path) -> None:
    html = page(open_run(eventful), now=T + 160)
    found = read(html)
    assert list(found.sections) == SECTIONS
    assert "running, last sign of life 10 s ago" in found.text
    for text in ("40 of 100", "35.4%", "100 GiB", "20 GiB"):
        assert text in found.text
    for title in ("loss", "samples per second", "memory, GiB", "learning rate", "gradient norm", "utilisation, %"):
        assert f"{title} over the step" in html, title
    assert "4 steps, 8 s" in found.sections["time"] and "none yet" in found.sections["time"]
    assert "loss is <spike> & more (loss 9, grad_norm -)" in found.sections["trouble"]
    assert "2 samples: a/7: cannot be decoded; a/8: torn" in found.sections["trouble"]
    assert "back to step 30, global batches 31 to 35 skipped" in found.sections["trouble"]
    assert "2 GiB" in found.sections["checkpoints"] and "kept" in found.sections["checkpoints"]
    assert re.search(r"17\.0.*n\[7-8\]76-hung", found.sections["time"])
    assert "n3" in found.sections["ranks"] and "ECC errors" in found.sections["ranks"]
    assert "ranks 0-1  n7" in found.sections["ranks"]
    settings = dict(re.findall(r"<tr><td.*?>([\w.]+)</td><td.*?>(.*?)</td>", html))
    assert settings["optimizer.lr"] == "0.0002" and "optimizer.betas" not in settings
    assert settings["versions.torch"] == "2.13.0"
    assert settings["tracking.uri"] == "http://REDACTED@tracker" and "secret" not in html
    images = [base64.b64decode(address.split(",")[1]) for address in found.loads]
    assert [Image.open(io.BytesIO(data)).size for data in images] == [(1400, 35), (1400, 28), (1400, 21)]
    assert len(html) < 150_000
    ettr = f"{open_run(eventful).goodput['ettr']:.1%}"
    assert ettr != "60.0%" and found.text.count(ettr) >= 2 and "60.0%" not in found.text


def test_a_run_with_validation_has_a_chart_of_it(eventful: Path) -> None:
    assert "held-out loss over the step" not in page(open_run(eventful), now=T + 200)
    with (eventful / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (41, 42):
            file.write(json.dumps(line(step, val_loss=2.0, val_loss_ema=1.9)) + "\n")
    html = page(open_run(eventful), now=T + 200)
    assert "held-out loss over the step" in html and "averaged weights" in html


def test_a_run_on_sources_has_a_chart_and_a_table_of_them(eventful: Path) -> None:
    assert "Sources" not in read(page(open_run(eventful), now=T + 200)).text
    with (eventful / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, loss in ((41, 0.5), (42, None)):
            figures = {"samples": 1000 * step, "epochs": 1.25, "loss": loss, "bad_fraction": 0.002}
            rest = {f"source_{metric}_{name}": value for name in ("art", "web") for metric, value in figures.items()}
            file.write(json.dumps(line(step, **rest)) + "\n")
    html = page(open_run(eventful), now=T + 200)
    assert "loss of each source over the step" in html
    assert re.search(r"art</td>.*?42,000</td>.*?1\.25</td>.*?0\.200%</td>", html, flags=re.S)


def test_states(eventful: Path, tmp_path: Path) -> None:
    assert "ended without a record" in open_run(eventful).state(now=T + 400)
    metrics = eventful / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write(json.dumps({"time": T + 170, "event": "end", "step": 40, "outcome": "finished"}) + "\n")
        file.write('{"time": 17')  # torn
    assert open_run(eventful).state() == "finished"
    waiting = tmp_path / "waiting"
    (waiting / "slurm").mkdir(parents=True)
    (waiting / "slurm" / "recipe.yaml").write_text(load_recipe("tiny-mllm").to_yaml())
    found = read(page(open_run(waiting)))
    assert list(found.sections) == SECTIONS and "not started yet" in found.text and "64" in found.sections["settings"]
    begun = read(page(open_run(make(tmp_path / "begun", [start(20, 0)]))))
    assert "No step is logged yet" in begun.text and "starting" in begun.sections["time"]


def test_no_run(tmp_path: Path) -> None:
    for arguments in (["report", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, RunError) and str(result.exception).count("\n") == 0
        assert f"{tmp_path}: not a run folder" in str(result.exception)
    (tmp_path / "recipe.yaml").write_text("a: [")
    assert "not valid YAML" in str(CliRunner().invoke(app, ["report", str(tmp_path)]).exception)


def test_the_timeline(eventful: Path) -> None:
    """By hand: ready at 20; the last sign of the first start is 12 s before the second one's process began at 60."""
    found = open_run(eventful).metrics.attempts.found
    assert [(s.step, s.reached, s.lost_steps) for s in found] == [(0, 10, 4), (10, 40, 0)]
    at = [Interval(each.begin - T, each.end - T, each.kind) for each in intervals(found)]
    assert at == [
        Interval(0, 20, "startup"),
        Interval(20, 40, "step"),
        Interval(40, 48, "lost"),
        Interval(48, 80, "recovery"),
        Interval(80, 140, "step"),
    ]
    found[0].outcome = "finished"
    assert "other" in {each.kind for each in intervals(found)}, "the run was extended later"


def drawn(svg: str) -> tuple[list[list[tuple[float, float]]], dict[float, float]]:
    """Points of every curve in the SVG, and value -> height of the labels left of the axis."""
    paths = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: #123456', svg)
    curves = [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in paths]
    labels = re.findall(r'text-anchor: end[^"]*" x="[\d.]+" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    return curves, {float(text): float(y) for y, text in labels}


def drawn_chart(points: list[tuple[float, float]], **settings: bool) -> str:
    found = chart("loss", [Curve("loss", points, "#123456")], **settings)
    assert found is not None
    return found.svg


def test_charts() -> None:
    assert chart("nothing", [Curve("loss", [], "#123456")]) is None
    svg = drawn_chart([(10, 2.0), (20, 1.0), (30, float("nan")), (40, 0.0)], zero=True)
    assert svg == drawn_chart([(10, 2.0), (20, 1.0), (40, 0.0)], zero=True), "equal runs have equal pages"
    ((a, b, c),), heights = drawn(svg)
    assert b[0] - a[0] == pytest.approx((c[0] - b[0]) / 2, abs=0.01)
    assert b[1] - a[1] == pytest.approx(heights[1.0] - heights[2.0], abs=0.01)
    assert c[1] - b[1] == pytest.approx(heights[0.0] - heights[1.0], abs=0.01)
    ((a, b, c),), heights = drawn(drawn_chart([(1, 1000.0), (2, 10.0), (3, 0.1)]))
    assert b[1] - a[1] == pytest.approx(c[1] - b[1], abs=0.01) and {1000, 10, 0.1} <= heights.keys()
    assert re.search(r">50k<", drawn_chart([(1, 1.0), (50_000, 2.0)])), "a step in few characters"
    assert "<use" in drawn_chart([(7, 1.0)]), "a single value is a dot"


def test_a_long_curve_keeps_its_peaks() -> None:
    (points,), heights = drawn(drawn_chart([(float(i), 1.0 + (i == 7777) + i % 7 / 100) for i in range(10_000)]))
    assert len(points) < 2500
    assert min(y for _, y in points) == pytest.approx(heights[2.0], abs=4), "the labels' height is their baseline"


def test_the_first_steps_may_leave_the_axis() -> None:
    high = [(float(i), 40.0 if i == 0 else 1.0 + i % 2) for i in range(200)]
    assert max(drawn(drawn_chart(high))[1]) >= 20
    assert max(drawn(drawn_chart(high, falls=True))[1]) == 2


def test_smoothed() -> None:
    flat, wavy = Series(), Series()
    flat.extend([1, 2], [5.0, 5.0])
    assert flat.smoothed() == [(1, 5.0), (2, 5.0)]
    wavy.extend(range(2000), [float(i % 2) for i in range(2000)])
    assert all(0.4 < y < 0.6 for _, y in wavy.smoothed()[200:])


def test_compare_by_hand(tmp_path: Path) -> None:
    first = [start(20, 0), *(line(step) for step in range(1, 21))]
    second = [start(20, 0), *(line(step, loss=1 + 4 / step + 0.1 * (step > 5), mfu=0.5) for step in range(1, 17, 1))]
    for record in second[9:]:
        record["data_digest"] = "other"
    runs_ = [make(tmp_path / "one", first), make(tmp_path / "two", second, "optimizer.lr=5e-4", "seed=3")]
    environment = json.loads((runs_[1] / "environment.json").read_text())
    environment["versions"]["torch"] = "2.14.0"
    (runs_[1] / "environment.json").write_text(json.dumps(environment))
    out = tmp_path / "compared.html"
    arguments = ["compare", *map(str, runs_), "--out", str(out)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).output)
    assert found["runs"] == ["one", "two"]
    assert found["settings"] == {"seed": [0, 3], "optimizer.lr": [0.003, 0.0005]}
    assert found["environment"] == {"versions.torch": ["2.13.0", "2.14.0"]}
    assert found["figures"]["MFU, median"] == [0.354, 0.5] and found["figures"]["steps"] == [20, 16]
    assert found["figures"]["share waiting for data"] == [0.25, 0.25]
    (against,) = found["against_first"]
    assert (against["same_samples_to"], against["other_samples_at"], against["lines"]) == (8, 9, 16)
    assert against["mean_difference"] == pytest.approx(0.1 * 11 / 16) and not against["equal"]
    assert against["largest"] == pytest.approx(0.1) and against["last"] == pytest.approx(0.1)
    window = [1 + 4 / step for step in (12, 13, 14, 15, 16)]
    mean = sum(window) / 5
    spread = (sum((x - mean) ** 2 for x in window) / 4) ** 0.5
    assert found["loss"]["window"] == [12, 16] and found["loss"]["lines"] == [5, 5]
    assert found["loss"]["mean"] == pytest.approx([mean, mean + 0.1]) and found["loss"]["std"] == pytest.approx(
        [spread] * 2
    )
    html = read(out.read_text())
    for text in ("optimizer.lr", "2.14.0", "different from step 9, the same up to step 8", "loss, steps 12 to 16"):
        assert text in html.text
    assert html.count["svg"] == 8  # one per metric, and the difference of the losses
    table = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "optimizer.lr" in table and "optimizer.betas" not in table and str(out) in table


def test_compare_what_has_little(tmp_path: Path, eventful: Path) -> None:
    begun = make(tmp_path / "begun", [start(20, 0)])
    output = CliRunner().invoke(app, ["compare", str(eventful), str(begun)], catch_exceptions=False).output
    assert "no step logged by both" in output
    twin = CliRunner().invoke(app, ["compare", str(eventful), str(eventful)], catch_exceptions=False).output
    assert "equal to the bit on 40 lines" in twin and "Settings that differ: none" in twin
    (tmp_path / "mlartifacts").mkdir()
    others = [str(tmp_path / "mlartifacts"), __file__]
    with_others = CliRunner().invoke(app, ["compare", others[0], str(eventful), others[1], str(eventful)])
    assert [f"{path}: not a run folder, left out" in with_others.stderr for path in others] == [True, True]
    assert with_others.stdout == twin
    missing = CliRunner().invoke(app, ["compare", str(eventful), str(eventful), str(tmp_path / "typo")])
    assert "typo: no such run folder" in str(missing.exception)
    lone = CliRunner().invoke(app, ["compare", str(eventful), others[0]])
    assert "mlartifacts: not a run folder" in str(lone.exception)
    assert "two run folders" in str(CliRunner().invoke(app, ["compare", str(begun)]).exception)


@pytest.mark.multi
def test_two_real_runs(shards: Path, tmp_path: Path) -> None:
    """Another seed is other samples from the first step on; the page of a run names its settings."""
    for name, seed in (("one", 0), ("two", 1)):
        overrides = [f"name={name}", f"seed={seed}", "steps=3", "micro_batch=4"]
        ended = ranked.run(ranked.command, 2, runs.arguments(shards, tmp_path, *overrides))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
    paths = [str(tmp_path / name) for name in ("one", "two")]
    found = json.loads(CliRunner().invoke(app, ["compare", *paths, "--json"], catch_exceptions=False).output)
    assert found["settings"] == {"seed": [0, 1]} and found["environment"] == {}
    (against,) = found["against_first"]
    assert against["other_samples_at"] == 1 and against["lines"] == 3 and not against["equal"]
    CliRunner().invoke(app, ["report", paths[0]], catch_exceptions=False)
    html = read((tmp_path / "one" / "report.html").read_text())
    assert list(html.sections) == SECTIONS and "finished" in html.text and "3 of 3" in html.text
    lines = yaml.safe_load((tmp_path / "one" / "environment.json").read_text())["hosts"]
    assert len(lines) == 1 and lines[0] in html.sections["ranks"]
