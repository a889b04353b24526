"""What users wrote is printed as it is, and a result that cannot be written is one line."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from bifrost.data import Item, demo
from bifrost.slurm.preflight.finding import Finding
from bifrost.slurm.preflight.result import conclude
from bifrost.slurm.preflight.verdict import decide
from bifrost.trainer.cli import replay, report
from bifrost.trainer.errors import RunError
from bifrost.trainer.training import replay as module
from bifrost.trainer.training.replay import Replay
from bifrost.trainer.training.run_history import History, Place, Stretch

ODD = "[/b] a [red]ball[/red], :cat:"
"""Markup to rich: a tag that closes nothing, a colour, an emoji."""


@pytest.fixture
def found() -> Replay:
    place = Place(1, 1, Stretch(0, 0, 1, 1, 1), None, None, {"reason": f"skipped {ODD}"}, ())
    item = Item(0, 0, "[/k]", np.zeros((8, 8, 3), np.uint8), ODD, caption_member="[/m].txt")
    sample = {"key": "[/k]", "loss": 1.0, "caption": ODD, "caption_member": "[/m].txt", "caption_dropped": False}
    return Replay(place, 0, True, [item], [sample], None, [("[/gone]", f"unread {ODD}")], None)


@pytest.fixture
def replayed(found: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "replay", lambda *_: found)
    monkeypatch.setattr(History, "read", lambda _: History([found.place.stretch]))


@pytest.mark.usefixtures("replayed")
def test_replay_prints_captions_keys_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay.replay(tmp_path, step=1, batch=None, weights_step=None, out=tmp_path / "[out]", as_json=False)
    printed = capsys.readouterr().out
    for text in (
        "[/k]",
        f"skipped {ODD}",
        f"[/gone] could not be read and was replaced by a neighbour: unread {ODD}",
        "[out]",
    ):
        assert text in printed
    assert printed.count(ODD) == 3


@pytest.mark.usefixtures("replayed")
def test_replay_into_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(RunError, match=rf"^{out}: cannot be written \(.*Not a directory.*choose another path$"):
        replay.replay(tmp_path, step=1, batch=None, weights_step=None, out=out, as_json=False)


def test_compare_prints_settings(capsys: pytest.CaptureFixture[str]) -> None:
    report.show({"Settings [a]": (["", "[b]"], [["data.shards", "[a-f]*.tar"]]), "Of [/c]": ([""], [])})
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("Settings [a]", "[b]", "[a-f]*.tar", "Of [/c]: none"))


def test_preflight_prints_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {"node1": [Finding("disk", ":cat:", "[/mnt] is full")]}
    conclude(findings, decide(findings, False), None, None, None)  # type: ignore[arg-type]
    table = capsys.readouterr().out.rpartition("error:")[0]
    assert "[/mnt] is full" in table and ":cat:" in table


def test_the_demo_prints_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_drawings", dict)
    demo.make_demo(tmp_path / "[" / "b]", "drawings")
    assert f"{tmp_path}/[/b]: 0 training" in capsys.readouterr().err


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    report.write(page, "one", quiet=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=rf"^{page}: cannot be written \(.*No space left"):
        report.write(page, "other")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "one")]
