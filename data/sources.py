"""What an ingest can read: folders with captions beside the images, folders with a table, WebDataset tars.

Every source becomes a list of candidates in an order of its own, told by where their bytes lie; nothing is decoded.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DataError
from .files import filesystem, is_local
from .index import CAPTION_TYPE, IMAGE_TYPES, group_members, image_type
from .shards import expand, told

IMAGE_COLUMNS = ("file", "file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text")
TABLES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: all of it, or `size` from `offset` on."""

    url: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; raises OSError."""
        if not is_local(self.url):
            fs, path = filesystem(self.url)
            return fs.cat_file(path, start=self.offset, end=None if self.size is None else self.offset + self.size)
        with open(filesystem(self.url)[1], "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Candidate:
    """An image that may become a sample."""

    key: str
    members: dict[str, Piece]
    """The image, and from tars whatever else the sample holds, by extension."""
    caption: Piece | str
    """The text itself, or where it lies: a text member or file, or the JSON member whose field it is."""
    caption_fields: tuple[str, ...] = ()
    """Fields of the JSON member that may hold it; none for plain text."""


@dataclass
class Source:
    candidates: list[Candidate] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Key (or row, or tar) and reason of what is no candidate."""
    state: str = ""
    """Hash over names, sizes and times of everything listed: changes when the source does."""


def list_source(
    src: str, table: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """List what `src` offers. Raises DataError when there is nothing, or no caption to it."""
    if not os.path.isdir(src):
        if not src.endswith((".tar", "*", "]", "}")):
            raise DataError(f"{src}: no such folder; give a folder of images, or WebDataset tars")
        source = _tars(expand(src), caption_column)
    elif table is None and (tars := sorted(str(tar) for tar in Path(src).glob("*.tar"))):
        source = _tars(tars, caption_column)
    elif table is None and not (table := _own_table(Path(src))):
        source = _folder(Path(src))
    else:
        source = _rows(Path(src), Path(table), image_column, caption_column)
    return _without_duplicates(source)


def _without_duplicates(source: Source) -> Source:
    unique: dict[str, Candidate] = {}
    for candidate in source.candidates:
        if unique.setdefault(candidate.key, candidate) is not candidate:
            source.rejected.append((candidate.key, "duplicate key"))
    source.candidates = list(unique.values())
    return source


def _folder(root: Path) -> Source:
    source, seen, images = Source(), hashlib.sha256(), 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        here = set(names)
        for name in sorted(names):
            stem, dot, kind = name.rpartition(".")
            if not dot or kind.lower() not in IMAGE_TYPES:
                continue
            images += 1
            path = os.path.join(folder, name)
            text = f"{stem}.{CAPTION_TYPE}"
            _note(seen, path)
            key = _key(os.path.relpath(path, root))
            if text in here:
                _note(seen, os.path.join(folder, text))
                caption = Piece(os.path.join(folder, text))
                source.candidates.append(Candidate(key, {kind.lower(): Piece(path)}, caption))
            else:
                source.rejected.append((key, f"no caption: {text} is missing"))
    if not images:
        raise DataError(f"{root}: no images (.jpg, .jpeg, .png, .webp) in it or below; check the path")
    if not source.candidates:
        raise DataError(
            f"{root}: {images} images and no captions; put NAME.txt beside each image, or give a table with --table"
        )
    source.state = seen.hexdigest()
    return source


def _own_table(root: Path) -> str | None:
    """The table that goes by the customary name, `metadata`."""
    return next((str(path) for kind in TABLES if (path := root / f"metadata{kind}").is_file()), None)


def _rows(root: Path, table: Path, image_column: str | None, caption_column: str | None) -> Source:
    if not table.is_file():
        raise DataError(f"{table}: no such table; give a .csv, .jsonl or .parquet file with --table")
    source, seen = Source(), hashlib.sha256(table.read_bytes())
    columns, rows = _read_table(table)
    image_column = _column(table, columns, image_column, IMAGE_COLUMNS, "--image-column")
    caption_column = _column(table, columns, caption_column, CAPTION_COLUMNS, "--caption-column")
    captions = 0
    for number, row in enumerate(rows, start=1):
        name, caption = row.get(image_column), row.get(caption_column)
        if not isinstance(name, str) or not name:
            source.rejected.append((f"{table.name} row {number}", f"no file name under {image_column}"))
            continue
        path = os.path.join(root, name)
        kind = name.rpartition(".")[2].lower()
        key = _key(os.path.relpath(path, root))
        if kind not in IMAGE_TYPES:
            source.rejected.append((key, f"not a .jpg, .jpeg, .png or .webp: {name}"))
            continue
        if not os.path.isfile(path):
            source.rejected.append((key, f"no such file: {name}"))
            continue
        _note(seen, path)
        caption = caption if isinstance(caption, str) else ""
        captions += bool(caption.strip())
        source.candidates.append(Candidate(key, {kind: Piece(path)}, caption))
    if not source.candidates:
        raise DataError(f"{table}: none of the images under {image_column} lies in {root}; check SRC and the column")
    if not captions:
        raise DataError(f"{table}: no captions under {caption_column}; name another column with --caption-column")
    source.state = seen.hexdigest()
    return source


def _read_table(table: Path) -> tuple[list[str], Iterator[dict]]:
    """Column names and rows; a line that does not parse is a row without columns."""
    if table.suffix == ".csv":
        # A byte that is not UTF-8 must cost its row, not the table; clean_caption finds the surrogate.
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            try:
                rows = list(reader)
            except csv.Error as error:
                raise DataError(f"{table}: line {reader.line_num} is not CSV ({error}); put it right") from None
        return list(reader.fieldnames or []), iter(rows)
    if table.suffix == ".jsonl":
        rows = [_json_row(line) for line in table.read_bytes().splitlines() if line.strip()]
        return list(dict.fromkeys(name for row in rows for name in row)), iter(rows)
    if table.suffix == ".parquet":
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_table(table)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{table}: not a Parquet file ({str(error).splitlines()[0]}); check it") from None
        return found.column_names, iter(found.to_pylist())
    raise DataError(f"{table}: not a table; give a .csv, .jsonl or .parquet file")


def _json_row(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _column(table: Path, columns: list[str], wanted: str | None, guesses: tuple[str, ...], option: str) -> str:
    found = next((name for name in ([wanted] if wanted else guesses) if name in columns), None)
    if found is None:
        missing = f"no column {wanted}" if wanted else f"no column is called {' or '.join(guesses)}"
        raise DataError(f"{table}: {missing}; its columns are {', '.join(columns) or 'none'}: name one with {option}")
    return found


def _tars(tars: list[str], caption_column: str | None) -> Source:
    seen = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(_samples_of, tars))
    source, images, captions = Source(), 0, 0
    fields = (caption_column,) if caption_column else CAPTION_COLUMNS
    for tar, (state, samples, damage) in zip(tars, parts, strict=True):
        seen.update(f"{tar} {state}\n".encode())
        for key, members in samples:
            if image_type(members) is None:
                source.rejected.append((key, "no image"))
                continue
            images += 1
            text = members.pop(CAPTION_TYPE, None)
            if text is None and "json" not in members:
                source.rejected.append((key, "no caption: neither .txt nor .json"))
                continue
            captions += 1
            if text is None:
                source.candidates.append(Candidate(key, members, members["json"], fields))
            else:
                source.candidates.append(Candidate(key, members, text))
        if damage:
            source.rejected.append((tar, damage))
    if not images:
        raise DataError(f"{told(tars)}: no images (.jpg, .jpeg, .png, .webp); check the path")
    if not captions:
        raise DataError(f"{told(tars)}: no captions; samples need a .txt, or a .json with one")
    source.state = seen.hexdigest()
    return source


def _samples_of(tar: str) -> tuple[str, list[tuple[str, dict[str, Piece]]], str | None]:
    """State of a tar, its samples, and what is wrong with its rest."""
    samples, damage = [], None
    fs, path = filesystem(tar)
    try:
        state = fs.ukey(path)
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
            for key, members, _ in group_members(opened):
                pieces = {kind: Piece(tar, offset, size) for kind, (offset, size) in members.items()}
                samples.append((key, pieces))
            file.seek(-1024, os.SEEK_END)
            if file.read().strip(b"\0"):  # tarfile takes a cut inside a header for the end
                raise tarfile.ReadError("no end-of-archive mark")
    except FileNotFoundError:
        raise DataError(f"{tar}: no such tar; check the path") from None
    except tarfile.TarError as error:
        damage = f"the tar is damaged after {len(samples)} samples: {error}"
    return state, samples, damage


def _key(relative: str) -> str:
    """Path below the source -> key: no extension, and no dot in the base name, where WebDataset would end the key."""
    folder, name = os.path.split(relative.lstrip("./"))
    name = name.rpartition(".")[0].replace("%", "%25").replace(".", "%2E")
    return f"{folder}/{name}" if folder else name


def _note(seen: hashlib._Hash, path: str) -> None:
    stat = os.stat(path)
    seen.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
