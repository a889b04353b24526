"""The end of a run that hangs, at several hundred ranks: little work for each, and none blamed for being slow."""

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from bifrost.trainer.monitors import hang, stacks
from bifrost.trainer.monitors.hang import HangReport, collection_timeout_s, exit_timeout_s
from bifrost.trainer.monitors.phase_timer import PhaseTimer
from bifrost.trainer.monitors.stacks import RankStatus, write_json, write_status

_accesses: Counter[tuple[int, str]] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _accesses is not None and event in ("open", "os.listdir", "os.scandir") and "/stacks/" in str(arguments[0]):
        _accesses[threading.get_ident(), event] += 1


sys.addaudithook(_audit)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "run" / "stacks" / "start"
    place.mkdir(parents=True)
    (tmp_path / "run" / "slurm").mkdir()
    monkeypatch.setenv("BIFROST_RUN", str(tmp_path / "run"))
    return place


def status(rank: int, entered: int = 40, collective: str | None = None) -> dict:
    return asdict(RankStatus(rank, f"node{rank}", 1, 6, "forward", 70.0, entered, 0, collective, "a:1 f"))


def give_up(folder: Path, rank: int, ranks: int) -> threading.Thread:
    """That rank gives up, as far on as those of `answer`."""

    def answering() -> None:
        with open(folder / f"rank-{rank:05d}.txt", "w") as file:
            hosts = [f"node{rank}" for rank in range(ranks)]
            HangReport(rank, hosts, folder, phases, threading.get_ident(), file, 70.0, 60.0).collect_and_report()

    phases = PhaseTimer()
    phases.step, phases.entered = 6, 40
    thread = threading.Thread(target=answering)
    thread.start()
    return thread


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_work_of_all_ranks_grows_with_their_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hang, "COLLECTION_S", 4.0)
    for rank in range(4, 400):
        write_json(folder / f"rank-{rank:05d}.json", status(rank, entered=39 if rank == 7 else 40))
    global _accesses
    _accesses = Counter()
    try:
        others = [give_up(folder, rank, 400) for rank in (1, 2, 3)]
        time.sleep(1)
        first = give_up(folder, 0, 400)
        for thread in (first, *others):
            thread.join()
        accesses = _accesses
    finally:
        _accesses = None
    assert 400 <= accesses[first.ident or 0, "open"] < 410
    for thread in others:
        assert sum(count for (ident, _), count in accesses.items() if ident == thread.ident) < 10
    assert (report(folder)["rank"], report(folder)["host"]) == (7, "node7")
    assert capfd.readouterr().err.count("rank 7 on node7 is furthest behind") == 1
    outcome = json.loads((folder.parents[1] / "slurm" / "exit_record.json").read_text())
    assert outcome["host"] == "node7" and "furthest behind" in outcome["reason"]


def test_slow_answers_of_many_ranks_are_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "COLLECTION_S", 3.0)
    for rank in range(1, 512):
        write_json(folder / f"rank-{rank:05d}.json", status(rank, entered=39 if rank == 7 else 40))
    others = [folder / f"rank-{rank:05d}.json" for rank in range(256, 512)]
    for file in others:
        file.rename(file.with_suffix(".later"))

    def answer() -> None:  # by renaming: on a busy machine, writing so many files takes longer than the wait
        for file in others:
            file.with_suffix(".later").rename(file)

    late = threading.Timer(3.5, answer)
    late.start()
    give_up(folder, 0, 512).join()
    late.join()
    assert report(folder)["rank"] == 7 and "does not answer" not in report(folder)["reason"]


def test_without_rank_0_the_lowest_one_reports(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(hang, "COLLECTION_S", 1.0)
    for rank in range(5, 200):
        write_json(folder / f"rank-{rank:05d}.json", status(rank))
    for thread in [give_up(folder, rank, 200) for rank in (2, 3, 4)]:
        thread.join()
    assert report(folder)["rank"] == 0 and "nor do 1 others" in report(folder)["reason"]
    assert (folder / "reporter").read_text() == "2\n"
    assert capfd.readouterr().err.count("error: ") == 1


def test_the_ranks_leave_when_all_collectives_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "COLLECTION_S", 20.0)
    write_json(folder / "rank-00001.json", status(1, collective="gloo:all_reduce (under way)"))
    thread = give_up(folder, 0, 2)
    while not (folder.parents[1] / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(2)
    assert thread.is_alive() and not (folder / "report.json").exists()
    (folder / "rank-00001.collectives.json").write_text("{}")
    thread.join(15)
    assert not thread.is_alive() and report(folder)["event"] == "hang"


def test_an_answer_comes_before_its_collectives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        written.append(path.name)

    written: list[str] = []
    monkeypatch.setattr(stacks, "write_atomic", write)
    monkeypatch.setattr("bifrost.slurm.io.write_atomic", write)
    with open(folder / "rank-00003.txt", "w") as file:
        write_status(folder, RankStatus(**status(3)), file, b"{}")
    assert written == ["rank-00003.json", "rank-00003.collectives.json"]


def test_time_for_answers() -> None:
    assert [collection_timeout_s(ranks) for ranks in (1, 128, 512)] == [10, 10, 40]
    assert [exit_timeout_s(ranks) for ranks in (2, 128, 512)] == [30, 30, 120]
