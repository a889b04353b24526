"""Copies of checkpoints at another address: content, interruptions, other runs; a run on S3 under faults."""

import os
import shutil
from pathlib import Path

import pytest

import faulty_server
import object_store
import ranked
import runs
from bifrost.data.errors import DataError
from bifrost.trainer.checkpoint import uploading
from bifrost.trainer.checkpoint.copies import COPIES, Copies
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.checkpoint.uploading import HELD, claim, follow
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError

NAME = "step-{:08d}".format


@pytest.fixture
def run(tmp_path: Path, save) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    folder = tmp_path / "runs" / "a-run"
    for step in (10, 20):
        assert save(folder / "checkpoints", step, ranks=2) == [None, None]
    (folder / "recipe.yaml").write_text("steps: 20\n")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(copies: Copies, step: int) -> int:
    return copies.copy(step, copies.store.folder(step))


def test_a_copy_is_the_checkpoint(run: Path, tmp_path: Path) -> None:
    copies = Copies(run, f"{tmp_path}/there/")
    copies.claim()
    assert copies.missing(copies.there()) == [10, 20]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / NAME(20)).iterdir() if path.suffix != ".json")
    assert copy(copies, 20) > size
    there = tmp_path / "there" / "a-run"
    assert content(there / "checkpoints" / NAME(20)) == content(run / "checkpoints" / NAME(20))
    assert (there / "recipe.yaml").read_text() == "steps: 20\n"
    assert copies.missing(copies.there()) == [10] and list(copies.steps()) == [20]

    back = Copies(tmp_path / "elsewhere", f"{tmp_path}/there", name="a-run")
    back.fetch(20)
    store = Store(tmp_path / "elsewhere" / "checkpoints")
    assert store.steps() == [20] and store.verify(20) == []
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["checkpoints", COPIES, "recipe.yaml"]
    back.claim()  # it is the same run, which may continue there
    with pytest.raises(RunError, match="exists; remove it"):
        back.fetch(20)


def test_an_interrupted_copy_continues(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(run, str(tmp_path / "there"))
    sent: list[str] = []
    put = Copies._put

    def failing(self: Copies, file: Path, path: str, size: int | None) -> None:
        if len(sent) == 2:
            raise DataError("the network is down")
        sent.append(file.name)
        put(self, file, path, size)

    monkeypatch.setattr(Copies, "_put", failing)
    with pytest.raises(DataError, match="down"):
        copy(copies, 20)
    assert copies.missing(copies.there()) == [10, 20]
    with pytest.raises(RunError, match="has no complete checkpoint"):
        copies.steps()
    monkeypatch.setattr(Copies, "_put", put)
    first = [*sent]
    sent.clear()
    monkeypatch.setattr(Copies, "_put", lambda self, file, *rest: (sent.append(file.name), put(self, file, *rest))[1])
    copy(copies, 20)
    assert not set(first) & set(sent) and {*first, *sent} >= set(content(run / "checkpoints" / NAME(20)))
    assert content(tmp_path / "there/a-run/checkpoints" / NAME(20)) == content(run / "checkpoints" / NAME(20))


def test_another_checkpoint_of_the_same_step_is_copied_anew(run: Path, tmp_path: Path, save) -> None:
    """After a rollback: its files have the names and sizes of the old ones."""
    copies = Copies(run, str(tmp_path / "there"))
    copy(copies, 20)
    shutil.rmtree(run / "checkpoints" / NAME(20))
    save(run / "checkpoints", 20, ranks=2, seed=21)
    assert copies.missing(copies.there()) == [10, 20]
    copy(copies, 20)
    assert content(tmp_path / "there/a-run/checkpoints" / NAME(20)) == content(run / "checkpoints" / NAME(20))
    save(run / "checkpoints", 30, ranks=2)
    copy(copies, 30)
    for step in (20, 30):
        shutil.rmtree(run / "checkpoints" / NAME(step))
    save(run / "checkpoints", 15, ranks=2)
    copy(copies, 15)
    assert list(copies.steps()) == [15], "what was given up is not downloaded"


def test_what_is_damaged_is_no_copy(run: Path, tmp_path: Path) -> None:
    copies = Copies(run, str(tmp_path / "there"))
    copy(copies, 10)
    for place, fails in (
        (run / "checkpoints" / NAME(20), lambda: copy(copies, 20)),
        (
            tmp_path / "there/a-run/checkpoints" / NAME(10),
            lambda: Copies(tmp_path / "new", str(tmp_path / "there"), name="a-run").fetch(10),
        ),
    ):
        file = place / "rank-00001.safetensors"
        changed = bytearray(file.read_bytes())
        changed[-1] ^= 1
        file.write_bytes(changed)
        with pytest.raises(RunError, match=r"rank-00001\.safetensors: damaged, its content does not match the hash"):
            fails()
    assert list(copies.steps()) == [10]
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_copies_of_another_run_are_left_alone(run: Path, tmp_path: Path, save) -> None:
    copies = Copies(run, str(tmp_path / "there"))
    copy(copies, 20)
    before = content(tmp_path / "there/a-run/checkpoints" / NAME(20))
    again = tmp_path / "again" / "a-run"
    save(again / "checkpoints", 20, ranks=2, seed=7)
    with pytest.raises(RunError, match="has checkpoints of another run, the last one of step 20: `bifrost checkpoint"):
        claim(again, str(tmp_path / "there"))
    with pytest.raises(RunError, match="has checkpoints of another run; name another folder"):
        Copies(again, str(tmp_path / "there")).fetch(20)
    assert content(tmp_path / "there/a-run/checkpoints" / NAME(20)) == before


def test_old_copies_go_with_their_checkpoints(run: Path, tmp_path: Path, save) -> None:
    copies = Copies(run, str(tmp_path / "there"), keep=2)
    for step in (10, 20):
        copy(copies, step)
    shutil.rmtree(run / "checkpoints")  # a lost file system: nothing is removed there
    for step, left in ((30, [20, 30]), (40, [30, 40])):
        save(run / "checkpoints", step, ranks=2)
        copy(copies, step)
        shutil.rmtree(run / "checkpoints")
        assert list(copies.steps()) == left
        assert sorted(path.name for path in (tmp_path / "there/a-run/checkpoints").iterdir()) == list(map(NAME, left))


class Ending:
    """A parent whose run ends after a number of waits."""

    def __init__(self, waits: int, each=lambda: None) -> None:
        self.waits, self.each, self.over, self.said = waits, each, False, []

    def wait(self, seconds: float) -> None:
        self.each()
        self.waits -= 1
        self.over = self.waits <= 0

    def tell(self, line: str) -> None:
        self.said.append(line)


def test_the_process_copies_the_newest_first_and_the_last(run: Path, tmp_path: Path, save, monkeypatch) -> None:
    monkeypatch.setattr(uploading, "POLL_S", 0)
    copies = Copies(run, str(tmp_path / "there"), keep=9)
    parent = Ending(1, lambda: save(run / "checkpoints", 30, ranks=2))
    assert follow(copies, parent)
    assert list(copies.steps()) == [10, 20, 30]
    assert [line.split(" copied")[0] for line in parent.said] == [f"checkpoint of step {s}" for s in (20, 10, 30)]
    assert not (run / HELD).exists()


def test_failures_do_not_end_the_process(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(uploading, "POLL_S", 0)
    copies = Copies(run, str(tmp_path / "there"))
    (tmp_path / "there").write_text("in the way")
    parent = Ending(3, lambda: (tmp_path / "there").is_file() and (tmp_path / "there").unlink())
    assert follow(copies, parent) and list(copies.steps()) == [10, 20]
    assert parent.said[0].startswith(f"not copied to {copies.place}, training continues: ") and len(parent.said) == 3
    (tmp_path / "other").write_text("in the way")
    assert not follow(Copies(run, str(tmp_path / "other")), Ending(2)), "it gives up when the run has ended"


def train(environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(environment)
    ranked.command(arguments)


def bifrost(*arguments: object) -> None:
    assert not main.app(["checkpoint", *map(str, arguments)], standalone_mode=False)


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_continues_elsewhere_from_s3_under_faults(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """The same numbers as a run that never left, through a server that fails at random."""
    settings = ("checkpoint.every=2", "checkpoint.keep=2")
    (stayed,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path / "whole", "steps=8", *settings))
    assert stayed.code == 0, stayed.err
    with object_store.serving() as moto:
        object_store.fill(moto, "bucket", tmp_path / "nothing")
        faults = faulty_server.Plan(chance=0.1, faults=("503", "500", "reset"))
        with faulty_server.serving(moto, faults) as (address, plan):
            environment, upload = object_store.environment(address), "checkpoint.upload=s3://bucket/runs"
            arguments = runs.arguments(shards, tmp_path / "here", "steps=4", *settings, upload)
            (here,) = ranked.run(train, 1, environment, arguments)
            assert here.code == 0, here.err
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            assert "checkpoint of step 4 copied to s3://bucket/runs/tiny-mllm: " in here.out
            bifrost("download", "s3://bucket/runs/tiny-mllm", tmp_path / "there/tiny-mllm")
            assert plan.fired, "faults"
    there = tmp_path / "there/tiny-mllm"
    assert Store(there / "checkpoints").steps() == [4]
    (moved,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path / "there", "steps=8", *settings))
    assert moved.code == 0, moved.err
    exact = ("step", "loss", "grad_norm", "data_digest")
    lines = [
        [[line[key] for key in exact] for line in runs.steps(run)] for run in (tmp_path / "whole/tiny-mllm", there)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 8


@pytest.mark.multi
@pytest.mark.slow
def test_storage_that_refuses_leaves_the_run_alone(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=4", "checkpoint.every=2")
    (plain,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path / "plain", *settings))
    arguments = runs.arguments(shards, tmp_path / "lonely", *settings, "checkpoint.upload=s3://bucket/runs")
    (lonely,) = ranked.run(train, 1, object_store.environment("http://127.0.0.1:9"), arguments)
    assert plain.code == lonely.code == 0, lonely.err
    assert "training continues, and tries again" in lonely.out
    assert "the last checkpoint is not copied; `bifrost checkpoint upload" in lonely.out
    losses = [runs.losses(tmp_path / each / "tiny-mllm") for each in ("plain", "lonely")]
    assert losses[0] == losses[1]
    assert Store(tmp_path / "lonely/tiny-mllm/checkpoints").verify(4) == []
