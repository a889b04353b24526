"""Make indexed shards from images and captions. Killed at any moment, the same command goes on.

The candidates are cut into shards before anything is read, so the work is the same on every start. A shard is done when
its report lies in `OUT/.ingest`, which is written after shard and index; all three appear whole or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import DataError
from .files import write_atomic
from .index import CAPTION_TYPE, image_type, index_path
from .processes import in_processes, sole_owner
from .sources import Candidate, Piece, list_source
from .transforms import clean_caption, decode_image
from .write import Sample, preload, write_shard

CHECKED_AT = 64  # pixels; decoding to a small size still reads the whole file


class Summary(NamedTuple):
    """What an ingest has made, in all its starts."""

    shards: int
    samples: int
    rejected: int


class _Task(NamedTuple):
    shard: Path
    report: Path
    candidates: list[Candidate]


def ingest(
    src: str | Path,
    out: str | Path,
    *,
    table: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    samples_per_shard: int = 1000,
    processes: int | None = None,
) -> Summary:
    """Write the images and captions of `src` to `out` as `train-*.tar` with indexes; images are copied byte for byte.

    src: folder of images with NAME.txt beside each, or with a table (`table`, or `metadata.csv|jsonl|parquet` in it),
    or WebDataset tars. Items that cannot be trained on go to `out/rejected.jsonl` with their reason.
    Raises DataError when the source holds nothing to ingest, or is not the one that `out` was begun from.
    """
    src, out = str(src), Path(out)
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; set it to 1 or more")
    source = list_source(src, str(table) if table else None, image_column, caption_column)
    journal = {
        "version": 1,
        "source": src if "://" in src else str(Path(src).resolve()),
        "table": str(Path(table).resolve()) if table else None,
        "image_column": image_column,
        "caption_column": caption_column,
        "samples_per_shard": samples_per_shard,
        "content": source.state,
    }
    reports = out / ".ingest"
    starts = range(0, len(source.candidates), samples_per_shard)
    tasks = [
        _Task(
            out / f"train-{number:05d}.tar",
            reports / f"{number:05d}.json",
            source.candidates[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]
    with sole_owner(out), sole_owner(reports):
        _agree(out, reports / "journal.json", journal)
        _work(tasks, processes)
        return _conclude(out, tasks, source.rejected)


def _agree(out: Path, path: Path, journal: dict) -> None:
    """Take up the folder for this source and these options, or refuse it."""
    if not path.exists():
        taken = next(out.glob("*.tar"), None)
        if taken:
            raise DataError(f"{taken}: not made by this ingest; name a folder without shards")
        write_atomic(path, json.dumps(journal, indent=1).encode())
        return
    before = json.loads(path.read_bytes())
    other = [name for name in journal if before.get(name) != journal[name]]
    if other:
        raise DataError(
            f"{out}: begun with another {' and '.join(other)}; give the same source and options, or an empty folder"
        )


def _work(tasks: list[_Task], processes: int | None) -> None:
    missing = [task for task in tasks if not _done(task)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        images = sum(len(task.candidates) for task in tasks)
        bar = progress.add_task("images", total=images)
        progress.advance(bar, images - sum(len(task.candidates) for task in missing))
        if missing:
            preload()
            for advanced in in_processes(_make_shard, missing, processes):
                progress.advance(bar, advanced)


def _done(task: _Task) -> bool:
    return task.report.exists() and task.shard.exists() and Path(index_path(str(task.shard))).exists()


def _make_shard(task: _Task) -> int:
    """Write one shard, its index and its report; returns the number of its candidates."""
    rejected: list[tuple[str, str]] = []

    def samples():
        for candidate in task.candidates:
            try:
                yield candidate.key, _load(candidate)
            except (ValueError, FileNotFoundError, PermissionError) as error:
                rejected.append((candidate.key, str(error)))

    try:
        header = write_shard(task.shard, samples())
        write_atomic(task.report, json.dumps({"samples": header.samples, "rejected": rejected}).encode())
    except OSError as error:
        raise DataError(f"{task.shard}: {error}; put it right and run the same command again, it goes on") from None
    return len(task.candidates)


def _load(candidate: Candidate) -> Sample:
    """The members of a sample. ValueError with the reason when it cannot be trained on."""
    caption = clean_caption(_caption(candidate))
    members = {kind: piece.read() for kind, piece in candidate.members.items()}
    kind = image_type(candidate.members)
    assert kind is not None, "a candidate has an image"
    decode_image(members[kind], CHECKED_AT)
    return {**members, CAPTION_TYPE: caption.encode()}


def _caption(candidate: Candidate) -> bytes | str:
    text = candidate.caption.read() if isinstance(candidate.caption, Piece) else candidate.caption
    if not candidate.caption_fields:
        return text
    try:
        described = json.loads(text)
    except ValueError:
        raise ValueError("its .json does not parse") from None
    for name in candidate.caption_fields if isinstance(described, dict) else ():
        if isinstance(described.get(name), str):
            return described[name]
    raise ValueError(f"its .json has no text under {' or '.join(candidate.caption_fields)}")


def _conclude(out: Path, tasks: list[_Task], unlisted: list[tuple[str, str]]) -> Summary:
    """Gather the reports into `rejected.jsonl`."""
    reports = [json.loads(task.report.read_bytes()) for task in tasks]
    rejected = [*unlisted, *(tuple(item) for report in reports for item in report["rejected"])]
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rejected]
    write_atomic(out / "rejected.jsonl", "".join(lines).encode())
    samples = sum(report["samples"] for report in reports)
    if not samples:
        reason, count = Counter(reason for _, reason in rejected).most_common(1)[0]
        raise DataError(f"{out}: nothing was usable, {count} times because: {reason}; see {out / 'rejected.jsonl'}")
    return Summary(len(tasks), samples, len(rejected))
