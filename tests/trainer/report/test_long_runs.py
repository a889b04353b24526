"""Long metrics files: bounded memory, and the figures of a plain reading."""

import json
import random
import statistics
import tracemalloc
from pathlib import Path

import pytest

from bifrost.slurm.exit_record import last_metrics
from bifrost.slurm.io import newest_records
from bifrost.trainer.monitors.goodput import Ledger
from bifrost.trainer.monitors.metrics import iter_metrics, read_events, read_metrics
from bifrost.trainer.report import compare as comparison
from bifrost.trainer.report.compare import compare, read
from bifrost.trainer.report.files import open_run
from bifrost.trainer.report.series import MOST, Mean, Median, Series
from bifrost.trainer.report.summary import Summary

SPIKE = 7_777
START = {"time": 0.0, "event": "start", "step": 0, "ranks": 2, "startup_s": 5.0}


def write(folder: Path, lines: int, every: int = 1, seed: int = 0) -> list[dict]:
    """A run folder whose losses have one spike; returns its records."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\n")
    draw = random.Random(seed)
    records: list[dict] = [START]
    for step in range(every, every * lines + 1, every):
        line = {"time": 2.0 * step, "step": step, "loss": draw.gauss(3, 0.1) + 9 * (step == SPIKE), "step_s": 1.5}
        records.append({**line, "data_wait_s": 0.25, "samples_per_s": draw.random(), "data_digest": f"2:{step % 9}"})
        if step % 1000 == 0:
            records.append({"time": 2.0 * step, "event": "checkpoint", "step": step, "seconds": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def peak_mib(folder: Path) -> float:
    """Peak of what Python and numpy allocate while the run is opened."""
    tracemalloc.start()
    open_run(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "short", 10_000)
    write(tmp_path / "long", 40_000)
    open_run(tmp_path / "short")  # imports
    short, long = peak_mib(tmp_path / "short"), peak_mib(tmp_path / "long")
    assert long < 10 and long < 1.3 * short, (short, long)


def test_a_long_run_keeps_its_spike_and_its_figures(tmp_path: Path) -> None:
    records = write(tmp_path / "one", 20_000)
    others = write(tmp_path / "two", 6_000, every=3, seed=1)
    runs = [open_run(tmp_path / name, None, Summary(("loss",), compared=True)) for name in ("one", "two")]
    lines = read(runs)
    found = compare(runs, lines)
    drawn = runs[0].metrics.curves["loss"].drawn()
    loss = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert len(drawn) <= 2 * MOST and (SPIKE, loss[SPIKE]) in drawn and set(drawn) <= set(loss.items())
    assert runs[0].goodput and runs[0].goodput["seconds"]["data_wait"] == 0.25 * 20_000
    median = statistics.median(record["samples_per_s"] for record in records if "loss" in record)
    assert found["figures"]["samples/s, median"][0] == pytest.approx(median, rel=2**-15)
    inside = [value for step, value in loss.items() if found["loss"]["window"][0] <= step <= 18_000]
    assert found["loss"]["window"] == [13_500, 18_000] and found["loss"]["lines"][0] == len(inside)
    assert found["loss"]["mean"][0] == pytest.approx(statistics.fmean(inside), rel=1e-12)
    assert found["loss"]["std"][0] == pytest.approx(statistics.stdev(inside), rel=1e-9)
    apart = {each["step"]: each["loss"] - loss[each["step"]] for each in others if "loss" in each}
    (against,) = found["against_first"]
    largest = max(apart, key=lambda step: abs(apart[step]))
    assert (against["lines"], against["largest_at"]) == (6_000, largest)
    assert against["mean_difference"] == pytest.approx(statistics.fmean(apart.values()), rel=1e-9)
    assert (against["same_samples_to"], against["other_samples_at"], against["equal"]) == (18_000, None, False)


def test_large_files_are_read_by_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same result; the process of this test parses no line of the second and later runs."""
    for seed, name in enumerate(("one", "two", "three")):
        write(tmp_path / name, 3_000 - 500 * seed, every=1 + seed, seed=seed)

    def compared() -> dict:
        runs = [open_run(tmp_path / name, None, Summary(("loss",), compared=True)) for name in ("one", "two", "three")]
        return compare(runs, read(runs))

    expected = compared()
    monkeypatch.setattr(comparison, "LARGE", 1)
    parsed, here = [], Summary.read
    monkeypatch.setattr(Summary, "read", lambda self, path: parsed.append(path) or here(self, path))
    assert compared() == expected and parsed == []
    assert expected["loss"]["lines"] and expected["against_first"][1]["lines"]


def test_lines_that_are_added_together_count_as_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "run", 500)
    ledger = Ledger()
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        ledger.add(record)
    assert Ledger(iter_metrics(tmp_path / "run" / "metrics.jsonl")).summary() == ledger.summary()


def test_damaged_lines_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    bad = {"event": "bad_samples", "step": 2, "samples": [["\udc80", "torn"]]}
    texts = [
        '{"step": 1}',
        '{"step": 2',
        '"a"',
        "",
        "\x00\x00",
        '"step": 3}',
        json.dumps(bad),
        '{"digest": "2:x"}',
        '{"st',
    ]
    file.write_text("\n".join(texts))
    whole = [{"step": 1}, bad, {"data_digest": "2:x"}]
    assert read_metrics(file) == whole and read_events(file) == [bad]
    assert list(newest_records(file)) == [{"digest": "2:x"}, bad, {"step": 1}]
    assert (
        read_metrics(tmp_path / "none")
        == read_events(tmp_path / "none")
        == list(newest_records(tmp_path / "none"))
        == []
    )


def test_the_newest_line_is_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = write(tmp_path / "run", 3_000)
    monkeypatch.setattr("bifrost.slurm.io.BLOCK", 1000)
    assert list(newest_records(tmp_path / "run" / "metrics.jsonl")) == records[::-1]
    assert last_metrics(tmp_path / "run") == records[-2]
    with open(tmp_path / "run" / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff" * 100_000)  # the beginning does not matter
    assert last_metrics(tmp_path / "run") == records[-2]


@pytest.mark.parametrize("count", [0, 1, MOST - 1, MOST, MOST + 1, 3 * MOST + 7])
def test_reduced_numbers(count: int) -> None:
    draw = random.Random(count)
    values = [draw.gauss(0, 1) * 10 ** draw.uniform(-3, 3) for _ in range(count)]
    curve, median, mean = Series(), Median(), Mean()
    for begin in range(0, count, 1000):
        part = values[begin : begin + 1000]
        curve.extend(range(begin, begin + len(part)), part)
        median.extend(part)
        mean.extend(part)
    drawn = curve.drawn()
    assert curve.count == mean.count == count and set(drawn) <= set(enumerate(values))
    if count < MOST:
        assert drawn == list(enumerate(values))
    if count:
        assert {min(values), max(values)} <= {value for _, value in drawn}
        assert median.value() == pytest.approx(statistics.median(values), rel=2**-15)
        assert mean.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    if count > 1:
        assert mean.deviation == pytest.approx(statistics.stdev(values), rel=1e-9)
