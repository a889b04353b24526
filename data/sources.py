"""Sources of an ingest: folders with captions next to the images, tables, WebDataset tars.

Every source is listed as candidates in a deterministic order, described by the location of their bytes. Nothing is
decoded.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .candidates import WRONG_TYPE, Candidate, Piece, Source, image_file, key_of, note, why_not
from .errors import DataError
from .index import CAPTION_TYPE, IMAGE_TYPES
from .local import is_kind, names_in, stat_of, with_retries
from .retry import call
from .shard_list import expand
from .source_images import SOURCE_IMAGE
from .table_source import one_split, table_source
from .tables import TABLES, Columns
from .tar_source import tar_source
from .units import counted
from .wildcards import matches

OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "svg", "tif", "tiff")
"""Extensions of images that are set aside with a reason instead of being ignored."""
SOURCE = ".source"
"""Ends the name of a source image, before its extension."""
REPORTS = ".ingest"
"""Folder with an ingest's own records, in its output folder."""
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2", ".7z")


def list_source(
    src: str,
    table: str | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    source_column: str | None = None,
    out: Path | None = None,
) -> Source:
    """List the candidates in `src`, excluding `out` if it is inside.

    Raises DataError when there are no images or no captions, the source is ambiguous, or an option has no effect.
    """
    columns = Columns(image_column, next(iter(caption_columns), None), tuple(caption_columns[1:]), source_column)
    if source_column is not None and source_column == image_column:
        raise DataError(f"--source-column {source_column}: the images themselves (--image-column); name another one")
    if table is not None:
        if not is_kind(src, stat.S_ISDIR):
            raise DataError(
                f"{src}: no such folder, and the file names in a table are relative to one; give its images"
            )
        source = call(lambda: table_source(Path(src), [Path(table)], columns), table)
    elif is_kind(src, stat.S_ISDIR):
        source = call(lambda: _local_folder(Path(src), columns, out), src)
    elif src.lower().endswith(TABLES):
        if "://" in src:
            raise DataError(f"{src}: a table is read from a local folder; download it and its images first")
        tables = [Path(each) for each in _tables(src)]
        source = call(lambda: table_source(tables[0].parent, tables, columns), src)
    elif src.endswith((".tar", "*", "]", "}")) or "://" in src:
        source = tar_source(expand(src), columns)
    elif stat_of(src):
        remedy = "unpack it" if src.lower().endswith(PACKED) else "give a folder of images, a table, or WebDataset tars"
        raise DataError(f"{src}: neither a folder, a table ({', '.join(TABLES)}) nor a plain .tar; {remedy}")
    else:
        raise DataError(f"{src}: no such folder; give a folder of images, or WebDataset tars")
    return _distinct(source)


def _tables(src: str) -> list[str]:
    """Tables that match a path with wildcards."""
    if not any(mark in src for mark in "*?[") or stat_of(src):
        return [src]
    found = [item["name"] if os.path.isabs(src) else os.path.relpath(item["name"]) for item in matches(src)]
    if not found:
        raise DataError(f"{src}: matches no table; check the path")
    return found


def _local_folder(root: Path, columns: Columns, out: Path | None) -> Source:
    names = names_in(root)
    tars = [path for name in names if name.endswith(".tar") and _is_file_or_link(path := os.path.join(root, name))]
    tables = [path for kind in TABLES if is_kind(path := root / f"metadata{kind}", stat.S_ISREG)]
    if len(tables) > 1 or (tars and tables):
        names = [*(path.name for path in tables), *(["*.tar"] if tars else [])]
        tars_too = f", or the tars as '{root}/*.tar'" if tars else ""
        raise DataError(f"{root}: holds {' and '.join(names)}; name the one to read: a table with --table{tars_too}")
    if tables:
        return table_source(root, tables, columns)
    if not tars:
        return _folder(root, columns, out)
    for folder, inside, _ in _walk(root, out, []):
        texts = _captions(inside)
        for name in inside:
            stem, _, kind = name.rpartition(".")
            if kind.lower() in IMAGE_TYPES and stem in texts:
                raise _mixed(root, os.path.join(folder, name), "tars", f"{root}/*.tar")
    return tar_source(tars, columns)


def _captions(names: Iterable[str]) -> dict[str, str]:
    """Caption files among the names of a folder, by their name without extension."""
    return {stem: name for name in names for stem, _, kind in [name.rpartition(".")] if kind.lower() == CAPTION_TYPE}


def _mixed(root: Path, image: str, others: str, pattern: str) -> DataError:
    return DataError(
        f"{root}: holds {others} and also images with captions ({os.path.relpath(image, root)}); name the {others} as"
        f" '{pattern}', or move them elsewhere to read the images"
    )


def _is_file_or_link(path: str) -> bool:
    mode = with_retries(lambda: os.lstat(path), path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _distinct(source: Source) -> Source:
    """Make keys unique: candidates with a taken key get their `other_key`, or are rejected as duplicates."""
    unique: dict[str, Candidate] = {}
    for candidate in source.candidates:
        key = candidate.key
        if key in unique:
            if candidate.other_key is None:
                source.rejected.append((key, "duplicate key"))
                continue
            key = candidate.other_key
            number = 2
            while key in unique:
                key, number = f"{candidate.other_key}-{number}", number + 1
        unique[key] = candidate if key == candidate.key else replace(candidate, key=key)
    source.candidates = list(unique.values())
    return source


class _Listed(NamedTuple):
    """One folder of a source."""

    path: str
    names: list[str]
    """Sorted names of its entries, without folders."""
    broken: dict[str, str]
    """Broken links among them, with the reason."""


def _walk(root: Path, out: Path | None, rejected: list[tuple[str, str]]) -> Iterator[_Listed]:
    """Yield `root` and the folders below it once each, following links, without the outputs of ingests. Unlike
    `os.walk`, does not take a folder for a file on a storage error."""
    left_out = stat_of(out) if out else None
    seen = {_identity(left_out)} if left_out else set()
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            identity = _identity(with_retries(lambda folder=folder: os.stat(folder), folder))
            if identity in seen:
                continue
            kinds = with_retries(lambda folder=folder: _kinds_in(folder), folder)
        except OSError as error:
            rejected.append((os.path.relpath(folder, root), f"the folder cannot be read: {error.strerror}"))
            continue
        seen.add(identity)
        if folder != str(root) and (REPORTS, stat.S_IFDIR) in kinds:
            continue  # shards of an earlier ingest
        listed, folders, linked = _Listed(folder, [], {}), [], []
        for name, kind in sorted(kinds):
            path = os.path.join(folder, name)
            if kind == stat.S_IFDIR:
                folders.append(path)
                continue
            if kind == stat.S_IFLNK:
                try:
                    if stat.S_ISDIR(with_retries(lambda path=path: os.stat(path), path).st_mode):
                        linked.append(path)
                        continue
                except OSError as error:
                    listed.broken[name] = why_not(path, error)
            listed.names.append(name)
        waiting += reversed(folders + linked)
        yield listed


def _kinds_in(folder: str) -> list[tuple[str, int]]:
    """Names in a folder, and for each whether it is a link (S_IFLNK), a folder (S_IFDIR) or something else (0)."""
    with os.scandir(folder) as entries:
        return [
            (entry.name, stat.S_IFLNK if entry.is_symlink() else stat.S_IFDIR if entry.is_dir() else 0)
            for entry in entries
        ]


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _folder(root: Path, columns: Columns, out: Path | None) -> Source:
    source, seen, images, tables, tar = Source(), hashlib.sha256(), 0, [], None
    for folder, names, broken in _walk(root, out, source.rejected):
        texts = _captions(names)
        sources = _source_images(names, texts)
        paired = {each for some in sources.values() for each in some}
        for name in names:
            stem, dot, kind = name.rpartition(".")
            path = os.path.join(folder, name)
            if name in paired:
                continue
            if name.endswith(".parquet"):
                tables.append(Path(path))
            tar = tar or (folder if name.endswith(".tar") else None)
            if not dot or kind.lower() not in (*IMAGE_TYPES, *OTHER_IMAGES):
                if name in broken and kind.lower() != CAPTION_TYPE:
                    # For example a folder of images on an unmounted disk.
                    source.rejected.append((os.path.relpath(path, root), broken[name]))
                continue
            images += 1
            key = key_of(os.path.relpath(path, root))
            found = _candidate(key, path, texts.get(stem), sources.get(stem, []), seen)
            if isinstance(found, Candidate):
                source.candidates.append(found)
            else:
                source.rejected.append((key, found))
    if source.candidates and (tables or tar):
        others, pattern = ("tars", f"{tar}/*.tar") if tar else ("Parquet tables", f"{tables[0].parent}/*.parquet")
        raise _mixed(root, next(iter(source.candidates[0].members.values())).url, others, pattern)
    if tables and not source.candidates:  # images without captions, such as a logo, are not the data
        return table_source(root, one_split(root, sorted(tables)), columns)
    if not images:
        packed = next((name for name in names_in(root) if name.endswith(PACKED)), None)
        hint = f"it holds {packed}: unpack that" if packed else "check the path"
        hint = f"name the tars below it as '{tar}/*.tar'" if tar else hint
        raise DataError(f"{root}: no images (.jpg, .jpeg, .png, .webp) in it or below; {hint}")
    if not source.candidates:
        table = next((f" {root / name}" for name in names_in(root) if name.lower().endswith(TABLES)), "")
        reasons = Counter(re.sub(r":.*", "", reason) for _, reason in source.rejected)
        reason = reasons.most_common(1)[0][0]
        raise DataError(
            f"{root}: {counted(images, 'image')} and no captions; put NAME.txt next to each image, or give a table with"
            f" --table{table}"
            if reason == "no caption"
            else f"{root}: none of {counted(images, 'image')} is usable, most of them: {reason}"
        )
    named = {"image": columns.image, "caption": columns.caption, "source": columns.source}
    for option, value in named.items():
        if value:
            raise DataError(
                f"{root}: --{option}-column {value} has no effect on a folder of images with NAME.txt; leave it out, or"
                " name a table with --table"
            )
    source.state = seen.hexdigest()
    return source


def _source_images(names: Sequence[str], texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The source images among the names of a folder, NAME.source.jpg next to NAME.jpg, by NAME. texts: a name with a
    caption of its own is an image like others."""
    images: dict[str, list[str]] = {}
    for name in names:
        stem, _, kind = name.rpartition(".")
        if kind.lower() in (*IMAGE_TYPES, *OTHER_IMAGES):
            images.setdefault(stem, []).append(name)
    ends = ((stem.removesuffix(SOURCE), stem) for stem in images if stem.endswith(SOURCE) and stem not in texts)
    return {stem: images[source] for stem, source in ends if stem in images}


def _candidate(key: str, path: str, text: str | None, sources: Sequence[str], seen: hashlib._Hash) -> Candidate | str:
    """The image at `path` with the caption and source images next to it; or why it cannot be used."""
    folder, name = os.path.split(path)
    stem, _, kind = name.rpartition(".")
    if kind.lower() in OTHER_IMAGES:
        return f"{WRONG_TYPE}: {name}"
    if problem := note(seen, path):
        return problem
    if text is None:
        return f"no caption: {stem}.{CAPTION_TYPE} is missing"
    if problem := note(seen, os.path.join(folder, text)):
        return f"its caption {text}: {problem}"
    members = {kind.lower(): Piece(path)}
    for source in sources:
        found = image_file(folder, source, seen)
        found = f"several: {', '.join(sources)}" if len(sources) > 1 else found
        if isinstance(found, str):
            return f"{SOURCE_IMAGE}{found}"
        members[f"source.{found[0]}"] = found[1]
    return Candidate(key, members, Piece(os.path.join(folder, text)))
