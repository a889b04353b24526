"""Make indexed shards from images and captions. After a kill, the same command resumes.

Candidates are assigned to shards before anything is read, so every attempt does the same work. A shard is finished when
its report is in `OUT/.ingest`, written after the shard and its index, and both still fit it (`finished.py`); all three
are written atomically, into a folder or an object store.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from .candidates import Candidate, JsonField, Piece
from .captions import captions_of, further_members, numbered
from .errors import DataError, DataLost, DataMissing
from .files import content, is_local, names_at, write
from .finished import is_finished, save_report
from .index import CAPTION_TYPE, image_type
from .local import is_kind, names_in
from .processes import in_processes, sole_owner
from .progress import progress, track
from .remote import filesystem
from .retry import described, is_transient
from .source_images import SOURCE_IMAGE, source_type
from .sources import REPORTS, list_source
from .spread import THREADS
from .transforms import clean_caption, decode_image, image_kind
from .transience import verdict
from .upload import require_store, staged
from .write import Sample, preload, write_shard

CHECKED_AT = 64  # pixels; decoding to a small size still reads the whole file


class Summary(NamedTuple):
    """Totals of an ingest over all its attempts."""

    shards: int
    samples: int
    rejected: int


class _Task(NamedTuple):
    shard: str
    report: str
    candidates: list[Candidate]
    others: list[str]
    """Members of their `other_captions`."""


def ingest(
    src: str | Path,
    out: str | Path,
    *,
    table: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    source_column: str | None = None,
    samples_per_shard: int = 1000,
    processes: int | None = None,
) -> Summary:
    """Write the images and captions of `src` to `out` as `train-*.tar` with indexes; images are copied byte for byte.

    src: folder of images with NAME.txt next to each, or with a table (`table`, or `metadata.csv|jsonl|parquet` in it);
    WebDataset tars; a table; or a folder of Parquet files that embed images. image_column, caption_column,
    source_column: columns of the table; for tars, extensions of the members, or the caption's field in KEY.json.
    Captions of several columns, and of a list, are members of their own: `captions.further_members`,
    `captions.numbered`. The source images of editing pairs are those of `source_column`, NAME.source.jpg in a folder,
    and KEY.source.jpg in tars. Everything read becomes a sample or is listed in `out/rejected.jsonl` with its reason.
    out: a folder, or the URL of one in an object store. Raises DataError when the source has nothing to ingest, or
    differs from the one that `out` was started from.
    """
    src, out = str(src), str(out).rstrip("/") or "/"
    require_store(out)
    folder = Path(filesystem(out)[1]) if is_local(out) else None
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; set it to 1 or more")
    if folder and "://" not in src:
        _require_apart(folder, Path(src))
    columns = [caption_column] if isinstance(caption_column, str) else list(caption_column or ())
    others = further_members(columns)
    with progress("listing the source"):
        source = list_source(src, str(table) if table else None, image_column, columns, source_column, folder)
    for damage in source.damaged:
        print(f"damaged: {damage}", file=sys.stderr, flush=True)
    journal = {
        "version": 2,
        "source": src if "://" in src else str(Path(src).resolve()),
        "table": str(Path(table).resolve()) if table else None,
        "image_column": image_column,
        "caption_column": columns if others else next(iter(columns), None),
        "source_column": source_column,
        "samples_per_shard": samples_per_shard,
        "content": source.state,
    }
    reports = f"{out}/{REPORTS}"
    tasks = _divided(source.candidates, samples_per_shard, out, others)
    with ExitStack() as owned:
        for each in (folder, folder / REPORTS) if folder else ():  # an object store has no locks
            owned.enter_context(sole_owner(each))
        _agree(out, f"{reports}/journal.json", journal)
        _work(tasks, processes)
        return _conclude(out, tasks, source.rejected)


def _require_apart(folder: Path, src: Path) -> None:
    if folder.resolve() == (src if is_kind(src, stat.S_ISDIR) else src.parent).resolve():
        raise DataError(f"{folder}: the source itself; name another folder for the shards")


def _divided(candidates: list[Candidate], samples_per_shard: int, out: str, others: list[str]) -> list[_Task]:
    return [
        _Task(
            f"{out}/train-{number:05d}.tar",
            f"{out}/{REPORTS}/{number:05d}.json",
            candidates[start : start + samples_per_shard],
            others,
        )
        for number, start in enumerate(range(0, len(candidates), samples_per_shard))
    ]


def _agree(out: str, url: str, journal: dict) -> None:
    """Claim the folder for this source and these options, or check that it was; raises DataError otherwise."""
    try:
        found = content(url)
    except DataMissing:
        found = None
    if found is None:
        foreign = next((name for name in names_at(out) if not name.startswith(".")), None)
        if foreign:
            raise DataError(f"{out}/{foreign}: not made by this ingest; name a new or an empty folder for the shards")
        write(url, json.dumps(journal, indent=1).encode())
        return
    try:
        before = json.loads(found)
        if not isinstance(before, dict):
            raise ValueError
    except ValueError:
        raise DataError(f"{url}: damaged; name a new folder for the shards") from None
    other = [name for name in journal if before.get(name) != journal[name]]
    if other:
        raise DataError(
            f"{out}: started with another {' and '.join(other)}; give the same source and options, or an empty folder"
        )


def _work(tasks: list[_Task], processes: int | None) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        finished = pool.map(lambda task: is_finished(task.shard, task.report), tasks)
        shown = track(tasks, "checking the finished ones of", len(tasks), "shards")
        missing = [task for task, done in zip(shown, finished, strict=True) if not done]
    images, left = (sum(len(task.candidates) for task in some) for some in (tasks, missing))
    if not missing:
        return
    preload()
    with progress("ingesting", images, "images", done=images - left) as shown:
        for advanced in in_processes(_make_shard, missing, processes):
            shown.advance(advanced)


def _make_shard(task: _Task) -> int:
    """Write one shard, its index and its report; returns the number of its candidates."""
    rejected: list[tuple[str, str]] = []

    def samples():
        for candidate in task.candidates:
            try:
                sample = _load(candidate, task.others)
            except (ValueError, FileNotFoundError, PermissionError) as error:
                if isinstance(error, DataError) or is_transient(error) or _folder_is_gone(error):
                    raise  # a failure of the storage, not of the item
                rejected.append((candidate.key, described(error) if isinstance(error, OSError) else str(error)))
            else:
                yield candidate.key, sample

    try:
        with staged(task.shard) as file:
            header = write_shard(file, samples())
        assert header.samples + len(rejected) == len(task.candidates), "every candidate is one or the other"
        save_report(task.report, task.shard, header, rejected)
    except DataError:
        raise
    except Exception as error:
        if verdict(error) is None and not isinstance(error, OSError):
            raise
        kind = DataLost if is_transient(error) else DataError
        again = "fix it and run the same command again to resume"
        raise kind(f"{task.shard}: {described(error)}; {again}") from None
    return len(task.candidates)


def _folder_is_gone(error: Exception) -> bool:
    """Whether a listed file is missing together with everything in its folder, as when a mount disappears."""
    if not isinstance(error, FileNotFoundError) or not error.filename:
        return False
    folder = os.path.dirname(os.path.abspath(error.filename))
    return not is_kind(folder, stat.S_ISDIR) or not names_in(folder)


def _load(candidate: Candidate, others: list[str]) -> Sample:
    """The content of a sample's members. others: those of its further captions. Raises ValueError with the reason when
    the sample is unusable."""
    texts = numbered(CAPTION_TYPE, _captions(candidate))
    for member, value in zip(others, candidate.other_captions, strict=True):
        texts |= numbered(member, captions_of(_field(value) if isinstance(value, JsonField) else value))
    captions = {member: clean_caption(text).encode() for member, text in texts.items()}
    if not captions:
        clean_caption("")  # raises
    members = {kind: piece.read() for kind, piece in candidate.members.items() if kind != CAPTION_TYPE}
    if candidate.image:
        data = candidate.image.read()
        members[image_kind(data)] = data
    kind = image_type(members)
    assert kind is not None, "a candidate has an image"
    decode_image(members[kind], CHECKED_AT)
    try:
        if candidate.source_image:
            data = candidate.source_image.read()
            members[f"source.{image_kind(data)}"] = data
        if source := source_type(members):
            decode_image(members[source], CHECKED_AT)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise ValueError(f"{SOURCE_IMAGE}{error}") from None
    return {**members, **captions}


def _field(asked: JsonField) -> Any:
    described = _parsed(asked.member.read()) if asked.member else None
    return described.get(asked.name) if isinstance(described, dict) else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its .json does not parse") from None


def _captions(candidate: Candidate) -> list[str | bytes]:
    found = candidate.caption.read() if isinstance(candidate.caption, Piece) else candidate.caption
    if not candidate.caption_fields:
        return captions_of(found)
    described = _parsed(found)
    for name in candidate.caption_fields if isinstance(described, dict) else ():
        if described.get(name) is not None:
            return captions_of(described[name])
    if candidate.other_captions:
        return []
    raise ValueError(f"its .json has no text under {' or '.join(candidate.caption_fields)}")


def _conclude(out: str, tasks: list[_Task], unlisted: list[tuple[str, str]]) -> Summary:
    """Merge the reports into `rejected.jsonl`."""
    with ThreadPoolExecutor(THREADS) as pool:
        reports = [json.loads(found) for found in pool.map(lambda task: content(task.report), tasks)]
    rejected = [*unlisted, *(tuple(item) for report in reports for item in report["rejected"])]
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rejected]
    write(f"{out}/rejected.jsonl", "".join(lines).encode())
    samples = sum(report["samples"] for report in reports)
    if not samples:
        reason, count = Counter(reason for _, reason in rejected).most_common(1)[0]
        raise DataError(f"{out}: nothing was usable, {count} times because: {reason}; see {out}/rejected.jsonl")
    return Summary(len(tasks), samples, len(rejected))


def reasons(out: str) -> Counter[str]:
    """Reasons why items were set aside, without the names in them, and their counts."""
    found = (json.loads(line)["reason"] for line in content(f"{out}/rejected.jsonl").decode().splitlines())
    before = ((SOURCE_IMAGE if reason.startswith(SOURCE_IMAGE) else "", reason) for reason in found)
    return Counter(prefix + reason.removeprefix(prefix).partition(": ")[0] for prefix, reason in before)
