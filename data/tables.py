"""Tables of images and captions: CSV, JSON lines, Parquet. No row is skipped: an unreadable one has a reason."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .captions import CAPTION_COLUMNS
from .errors import DataError
from .index import IMAGE_TYPES
from .local import is_kind, with_retries
from .units import counted

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_COLUMNS = ("file", "file_name", "filename", "image", "path")
DELIMITERS = (",", "\t", ";", "|")
LONGEST_FIELD = 1 << 30  # characters; csv's own limit of 131,072 is too small for some captions
MOST_LINES = 1000
"""Limit for a row with a multi-line quoted field; a longer one has an unclosed quote."""


class Row(NamedTuple):
    """A row of a table."""

    where: str
    """`metadata.csv line 7`"""
    image: Any
    """File name, object that contains it, or a `RowBytes`."""
    caption: Any
    problem: str | None = None
    """Why the row cannot be used."""
    other_captions: tuple[Any, ...] = ()
    """Of further columns."""
    source: Any = None
    """The source image, like `image`."""


class Chosen(NamedTuple):
    """Names of the columns that are read of a table."""

    image: str
    caption: str
    others: tuple[str, ...]
    source: str | None

    @property
    def every(self) -> list[str]:
        return [self.image, self.caption, *self.others, *([self.source] if self.source is not None else [])]


class Columns(NamedTuple):
    """The columns to read, as named by the user; None for the default names."""

    image: str | None
    caption: str | None
    others: tuple[str, ...] = ()
    """Columns of further captions."""
    source: str | None = None
    """The column of source images; None: there are none."""

    @property
    def image_guesses(self) -> tuple[str, ...]:
        """Default names of the image's column."""
        return tuple(name for name in IMAGE_COLUMNS if name != self.source)

    def choose(self, table: Path, names: Sequence[str]) -> Chosen:
        """Raises DataError when a column is missing or duplicate."""
        return Chosen(
            _column(table, names, self.image, self.image_guesses, "--image-column"),
            _column(table, names, self.caption, CAPTION_COLUMNS, "--caption-column"),
            tuple(_column(table, names, each, (), "--caption-column") for each in self.others),
            self.source and _column(table, names, self.source, (), "--source-column"),
        )


def _column(table: Path, names: Sequence[str], wanted: str | None, guesses: tuple[str, ...], option: str) -> str:
    found = next((name for name in ([wanted] if wanted else guesses) if name in names), None)
    if found is None:
        missing = f"no column {wanted}" if wanted else f"no column is named {' or '.join(guesses)}"
        raise DataError(f"{table}: {missing}; its columns are {', '.join(names) or 'none'}: name one with {option}")
    if (count := list(names).count(found)) > 1:
        raise DataError(f"{table}: {count} columns are named {found}; rename all but the one to read")
    return found


def read_table(table: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a table in order, without blank lines. Raises DataError when it is not a table or lacks a column."""
    if not is_kind(table, stat.S_ISREG):
        raise DataError(f"{table}: no such table; give a {', '.join(TABLES[:-1])} or {TABLES[-1]} file with --table")
    kind = table.suffix.lower()
    if kind not in TABLES:
        raise DataError(f"{table}: not a table; give a {', '.join(TABLES[:-1])} or {TABLES[-1]} file")
    if kind == ".parquet":
        from .parquet import read_parquet  # imports pyarrow, which other tables do not need

        return read_parquet(table, columns)
    try:
        return _read_csv(table, columns) if kind in (".csv", ".tsv") else _read_jsonl(table, columns)
    except OSError as error:
        raise DataError(f"{table}: {error.strerror or error}; check the path and who may read it") from None


def _lines(table: Path) -> Iterator[str]:
    """Lines with their line ends. Invalid UTF-8 becomes lone surrogates, so that it affects only its row."""
    data = with_retries(table.read_bytes, table)
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
    try:
        yield from io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors=errors, newline="")
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: invalid UTF-16 ({error}); save it as UTF-8") from None


class _Unclosed(Exception):
    pass


class _Numbered:
    """Lines with their numbers, counted from 1; lines can be pushed back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = iter(lines)
        self.given_back: list[str] = []
        self.number = 0
        """Number of the last line taken."""

    def take(self) -> str | None:
        line = self.given_back.pop() if self.given_back else next(self.lines, None)
        self.number += line is not None
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        self.given_back += reversed(lines)
        self.number -= len(lines)


def _read_csv(table: Path, columns: Columns) -> Iterator[Row]:
    lines = _Numbered(_lines(table))
    first = lines.take()
    while first is not None and not first.strip():
        first = lines.take()
    if first is None:
        raise DataError(f"{table}: empty; its first line must name the columns")
    delimiter = _delimiter(first, columns, "\t" if table.suffix.lower() == ".tsv" else ",")
    header = [name.strip() for name in _fields(first, delimiter)]
    return _csv_rows(table.name, lines, delimiter, header, columns.choose(table, header))


def _csv_rows(name: str, lines: _Numbered, delimiter: str, header: list[str], chosen: Chosen) -> Iterator[Row]:
    width, image = len(header), header.index(chosen.image)

    def is_row(line: str) -> bool:
        fields = _fields(line, delimiter)
        return len(fields) == width and fields[image].rpartition(".")[2].strip().lower() in IMAGE_TYPES

    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        while (line := lines.take()) is not None:
            where = f"{name} line {lines.number}"
            if not line.strip("\r\n"):
                continue
            if "\0" in line:
                yield Row(where, None, None, "it holds NUL bytes: a damaged copy?")
                continue
            fields, problem = _record(line, lines, delimiter, is_row)
            while len(fields) > width and not fields[-1].strip():
                fields.pop()
            if not problem and len(fields) != width:
                remedy = f"quote a text that contains {delimiter!r}" if len(fields) > width else "add the missing ones"
                problem = f"{counted(len(fields), 'field')}, and the header names {width}: {remedy}"
            if problem:
                yield Row(where, None, None, problem)
            else:
                yield _row(where, dict(zip(header, fields, strict=True)), chosen)
    finally:
        csv.field_size_limit(limit)


def _row(where: str, found: Mapping[str, Any], chosen: Chosen) -> Row:
    """The row with the fields `found`, by the names of their columns."""
    others = tuple(map(found.get, chosen.others))
    source = None if chosen.source is None else found.get(chosen.source)
    return Row(where, found.get(chosen.image), found.get(chosen.caption), None, others, source)


def _record(line: str, lines: _Numbered, delimiter: str, is_row: Any) -> tuple[list[str], str | None]:
    """Fields of the row that begins with `line`. When its quotes are not closed, only that line is rejected."""
    if '"' not in line:
        return [field.lstrip(" ") for field in line.rstrip("\r\n").split(delimiter)], None
    more: list[str] = []

    def following() -> Iterator[str]:
        yield line
        while (next_line := lines.take()) is not None:
            more.append(next_line)
            if is_row(next_line) or len(more) > MOST_LINES:
                raise _Unclosed
            yield next_line

    try:
        fields = next(csv.reader(following(), delimiter=delimiter, strict=True, skipinitialspace=True))
        texts = [field for field in fields if "\n" in field or "\r" in field]
        if any(_names_image(line, delimiter) for text in texts for line in re.split(r"[\r\n]+", text)):
            raise _Unclosed  # it was closed by a quote of a later row
        return fields, None
    except _Unclosed:
        problem = "a quote that opens in it is not closed"
    except csv.Error as error:
        problem = f"malformed quotes ({error}): double the quotes within a quoted text"
    lines.give_back(more)
    return [], problem


def _names_image(line: str, delimiter: str) -> bool:
    """Whether a line within a quoted text has an image's file name as a field, and is therefore a row."""
    fields = [field.strip(' "\r') for field in line.split(delimiter)]
    return len(fields) > 1 and any("." in field and field.rpartition(".")[2].lower() in IMAGE_TYPES for field in fields)


def _fields(line: str, delimiter: str) -> list[str]:
    """The fields of one line, ignoring errors in its quotes."""
    try:
        return next(csv.reader([line.replace("\0", "")], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _delimiter(header: str, columns: Columns, usual: str) -> str:
    """The delimiter with which the header has an image and a caption column."""
    for delimiter in (usual, *DELIMITERS):
        names = [name.strip() for name in _fields(header, delimiter)]
        wanted = (
            [columns.image] if columns.image else columns.image_guesses,
            [columns.caption] if columns.caption else CAPTION_COLUMNS,
        )
        if all(any(name in names for name in guesses) for guesses in wanted):
            return delimiter
    return max((usual, *DELIMITERS), key=lambda delimiter: len(_fields(header, delimiter)))


_TWICE = object()


def _object(pairs: list[tuple[str, Any]]) -> dict:
    found: dict[Any, Any] = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found[_TWICE] = {name for name in names if names.count(name) > 1}
    return found


def _read_jsonl(table: Path, columns: Columns) -> Iterator[Row]:
    asked = {columns.image, columns.caption, *columns.others, columns.source} - {None}
    kept = {*asked, *IMAGE_COLUMNS, *CAPTION_COLUMNS}
    names: dict[str, None] = {}
    rows: list[tuple[int, dict | str]] = []
    for number, line in enumerate(_lines(table), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            rows.append((number, f"not JSON ({error!s:.80})"))
            continue
        if not isinstance(row, dict):
            rows.append((number, "not a JSON object"))
            continue
        names.update((name, None) for name in row if isinstance(name, str))
        rows.append((number, {name: value for name, value in row.items() if name in kept or name is _TWICE}))
    if rows and not names:
        raise DataError(
            f"{table}: no line is a JSON object, line {rows[0][0]}: {rows[0][1]}; write one object per line"
        )
    return _jsonl_rows(table.name, rows, columns.choose(table, list(names)))


def _jsonl_rows(name: str, rows: list[tuple[int, dict | str]], chosen: Chosen) -> Iterator[Row]:
    for number, row in rows:
        where = f"{name} line {number}"
        if isinstance(row, str):
            yield Row(where, None, None, row)
        elif twice := row.get(_TWICE, set()) & {*chosen.every}:
            yield Row(where, None, None, f"it names {' and '.join(sorted(twice))} twice")
        else:
            yield _row(where, row, chosen)
