"""What an ingest can read: folders with captions next to the images, tables, WebDataset tars.

Every source becomes a list of candidates in an order of its own, described by where their bytes are. Nothing is
decoded.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .candidates import WRONG_TYPE, Candidate, Piece, Source, is_kind, key_of, note
from .errors import DataError
from .index import CAPTION_TYPE, IMAGE_TYPES
from .retry import call, is_transient
from .shards import expand
from .table_source import one_split, table_source
from .tables import TABLES, Columns
from .tar_source import tar_source

OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "svg", "tif", "tiff")
"""Extensions of images that are set aside with a reason instead of being taken for anything but images."""
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2", ".7z")


def list_source(
    src: str,
    table: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    out: Path | None = None,
) -> Source:
    """List what `src` offers; `out`, where that lies in it, is left out.

    Raises DataError when there is nothing, no caption to it, several things to choose from, or an option has no effect.
    """
    columns = Columns(image_column, caption_column)
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
    elif os.path.exists(src):
        raise DataError(f"{src}: neither a folder, a table ({', '.join(TABLES)}) nor a plain .tar; unpack it")
    else:
        raise DataError(f"{src}: no such folder; give a folder of images, or WebDataset tars")
    return _distinct(source)


def _tables(src: str) -> list[str]:
    """Tables that a path with wildcards names."""
    from glob import glob

    found = sorted(glob(src)) if not os.path.exists(src) and any(mark in src for mark in "*?[") else [src]
    if not found:
        raise DataError(f"{src}: matches no table; check the path")
    return found


def _local_folder(root: Path, columns: Columns, out: Path | None) -> Source:
    tars = sorted(str(tar) for tar in root.glob("*.tar") if tar.is_file() or tar.is_symlink())
    tables = [root / f"metadata{kind}" for kind in TABLES if (root / f"metadata{kind}").is_file()]
    if len(tables) > 1 or (tars and tables):
        names = [*(path.name for path in tables), *(["*.tar"] if tars else [])]
        tars_too = f", or the tars as '{root}/*.tar'" if tars else ""
        raise DataError(f"{root}: holds {' and '.join(names)}; name the one to read: a table with --table{tars_too}")
    if tables:
        return table_source(root, tables, columns)
    if not tars:
        return _folder(root, columns, out)
    beside = next((path for path in sorted(root.iterdir()) if _captioned(path)), None)
    if beside:
        raise DataError(
            f"{root}: holds tars and also images with captions ({beside.name}); name the tars as '{root}/*.tar', or"
            " move them elsewhere to read the images"
        )
    return tar_source(tars, columns)


def _captioned(path: Path) -> bool:
    return path.suffix.lower()[1:] in IMAGE_TYPES and path.with_suffix(f".{CAPTION_TYPE}").exists()


def _distinct(source: Source) -> Source:
    """Gives candidates of tars and rows whose key an earlier one has a key of their own; others are duplicates."""
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


def _walk(root: Path, out: Path | None, rejected: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Folders below `root` with the names in them; links to folders are followed, each folder comes once."""

    def unreadable(error: OSError) -> None:
        if is_transient(error):
            raise error
        rejected.append((os.path.relpath(error.filename, root), f"the folder cannot be read: {error.strerror}"))

    seen = {_identity(out)} if out and out.exists() else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        identity = _identity(folder)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield folder, sorted(names)


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _folder(root: Path, columns: Columns, out: Path | None) -> Source:
    source, seen, images, tables, tar = Source(), hashlib.sha256(), 0, [], None
    for folder, names in _walk(root, out, source.rejected):
        texts = {(stem, kind.lower()): name for name in names for stem, _, kind in [name.rpartition(".")]}
        for name in names:
            stem, dot, kind = name.rpartition(".")
            path = os.path.join(folder, name)
            if name.endswith(".parquet"):
                tables.append(Path(path))
            tar = tar or (folder if name.endswith(".tar") else None)
            if not dot or kind.lower() not in (*IMAGE_TYPES, *OTHER_IMAGES):
                if os.path.islink(path) and not os.path.exists(path) and kind.lower() != CAPTION_TYPE:
                    # Perhaps a folder of images on a disk that is not mounted.
                    target = os.readlink(path)
                    source.rejected.append((os.path.relpath(path, root), f"a link to {target}, which is not there"))
                continue
            images += 1
            key = key_of(os.path.relpath(path, root))
            text = texts.get((stem, CAPTION_TYPE))
            if kind.lower() in OTHER_IMAGES:
                source.rejected.append((key, f"{WRONG_TYPE}: {name}"))
            elif problem := note(seen, path):
                source.rejected.append((key, problem))
            elif text is None:
                source.rejected.append((key, f"no caption: {stem}.{CAPTION_TYPE} is missing"))
            elif problem := note(seen, os.path.join(folder, text)):
                source.rejected.append((key, f"its caption {text}: {problem}"))
            else:
                source.candidates.append(Candidate(key, {kind.lower(): Piece(path)}, Piece(os.path.join(folder, text))))
    if tables and not images:
        return table_source(root, one_split(root, sorted(tables)), columns)
    if not images:
        packed = next((path.name for path in sorted(root.iterdir()) if path.suffix in PACKED), None)
        hint = f"it holds {packed}: unpack that" if packed else "check the path"
        hint = f"name the tars below it as '{tar}/*.tar'" if tar else hint
        raise DataError(f"{root}: no images (.jpg, .jpeg, .png, .webp) in it or below; {hint}")
    if not source.candidates:
        table = next((f" {path}" for path in sorted(root.iterdir()) if path.suffix.lower() in TABLES), "")
        reasons = Counter(re.sub(r":.*", "", reason) for _, reason in source.rejected)
        reason = reasons.most_common(1)[0][0]
        raise DataError(
            f"{root}: {images} images and no captions; put NAME.txt beside each image, or give a table with"
            f" --table{table}"
            if reason == "no caption"
            else f"{root}: none of {images} images is usable, most of them: {reason}"
        )
    for option, value in zip(("--image-column", "--caption-column"), columns, strict=True):
        if value:
            raise DataError(
                f"{root}: {option} {value} has no effect on a folder of images with NAME.txt; leave it out, or name a"
                " table with --table"
            )
    source.state = seen.hexdigest()
    return source
