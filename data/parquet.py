"""Parquet tables of file names and captions, or of embedded images as stored by Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile

from .errors import DataError
from .local import with_retries
from .tables import Chosen, Columns, Row

ROWS = 32
"""Number of rows read at a time when they contain images."""


@dataclass(frozen=True)
class RowBytes:
    """An image embedded in a row: a binary column, or the field `bytes` of a struct."""

    table: str
    group: int
    row: int
    """Row number within the row group."""
    column: str
    name: str | None = None
    """File name in the row, if any."""

    def read(self) -> bytes:
        """The image's bytes. Storage errors are retried, then DataLost. Raises ValueError with the reason when the row
        has no image or is unreadable."""
        try:
            value = with_retries(self._value, self.table)
        except FileNotFoundError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"its row is unreadable: {_first_line(error)}") from None
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise ValueError("its row holds no image bytes")
        return value

    def _value(self) -> Any:
        with _reopened(_reader):
            return _reader(self.table, self.group, self.column).value(self.row)


class _Reader:
    """Values of one column of a row group, read sequentially, since a row group may be larger than memory."""

    def __init__(self, table: str, group: int, column: str) -> None:
        self.place = table, group, column
        self._begin()

    def _begin(self) -> None:
        table, group, column = self.place
        self.start, self.batch = 0, None
        self.batches = ParquetFile(table).iter_batches(
            ROWS,
            row_groups=[group],
            columns=[column],
            use_threads=False,  # threads do not survive a fork
        )

    def value(self, row: int) -> Any:
        if row < self.start:
            self._begin()
        while self.batch is None or row >= self.start + len(self.batch):
            self.start += len(self.batch) if self.batch is not None else 0
            self.batch = next(self.batches)
        return self.batch.column(0)[row - self.start].as_py()


_reader = lru_cache(maxsize=2)(_Reader)
"""Of the columns of the images and of the source images, which are read in turn."""


@lru_cache(maxsize=1)
def _file(table: Path) -> ParquetFile:
    return ParquetFile(table)


@contextmanager
def _reopened(cached: Any) -> Iterator[None]:
    """Forget a cached open file after an error: the handle of a network file system may never recover."""
    try:
        yield
    except OSError:
        cached.cache_clear()
        raise


def read_parquet(table: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a Parquet table, without reading embedded images. Raises DataError when it is not a Parquet file, lacks a
    column, or has an image column whose type is neither file names nor images."""
    _file.cache_clear()  # the table may have been replaced
    try:
        file = with_retries(lambda: _file(table), table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table}: not a Parquet file ({_first_line(error)}); check it") from None
    names = file.schema_arrow.names
    if columns.image is None:  # of several default names, the one with embedded images
        holding = [name for name in columns.image_guesses if name in names and _holds_images(_type(file, name))]
        columns = columns._replace(image=next(iter(holding), None))
    chosen = columns.choose(table, names)
    _require_images(table, file, chosen.image, "--image-column")
    if chosen.source is not None:
        _require_images(table, file, chosen.source, "--source-column")
    return _rows(table, file, chosen)


def _require_images(table: Path, file: ParquetFile, column: str, option: str) -> None:
    kind = _type(file, column)
    if not (_holds_images(kind) or _is_text(kind) or _has_path(kind)):
        raise DataError(f"{table}: column {column} holds {kind}, not file names or images; name one with {option}")


def _group(table: Path, number: int, columns: list[str]) -> pyarrow.Table:
    with _reopened(_file):
        return _file(table).read_row_group(number, columns=columns, use_threads=False)


def _rows(table: Path, file: ParquetFile, chosen: Chosen) -> Iterator[Row]:
    before, captions = 0, [chosen.caption, *chosen.others]
    images = [chosen.image, *([chosen.source] if chosen.source is not None else [])]
    wanted = list(dict.fromkeys([*captions, *(name for each in images for name in _names_of(file, each))]))
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        try:
            found = with_retries(lambda group=group: _group(table, group, wanted), table)
            texts = list(zip(*(found.column(each).to_pylist() for each in captions), strict=True))
            values = [_images(table, file, group, each, found) for each in images]
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"its row group is unreadable: {_first_line(error)}"
            yield from (Row(f"{table.name} row {before + row + 1}", None, None, problem) for row in range(rows))
            before += rows
            continue
        for row in range(rows):
            caption, *others = texts[row]
            image, source = values[0][row], values[1][row] if chosen.source is not None else None
            yield Row(f"{table.name} row {before + row + 1}", image, caption, None, tuple(others), source)
        before += rows


def _names_of(file: ParquetFile, column: str) -> list[str]:
    """What is read of a column of images in advance: file names. Embedded images are not."""
    kind = _type(file, column)
    return [f"{column}.path"] if _has_path(kind) else [column] if _is_text(kind) else []


def _images(table: Path, file: ParquetFile, group: int, column: str, found: pyarrow.Table) -> list[Any]:
    """The images of a row group in `column`: `RowBytes`, or the file names that were `found`."""
    rows = file.metadata.row_group(group).num_rows
    named = found.column(column).to_pylist() if column in found.column_names else [None] * rows
    names = [each["path"] if isinstance(each, dict) else each for each in named]
    if not _holds_images(_type(file, column)) or _all_null(file, group, f"{column}.bytes"):
        return names
    return [RowBytes(str(table), group, row, column, name) for row, name in enumerate(names)]


def _type(file: ParquetFile, column: str) -> pyarrow.DataType:
    kind = file.schema_arrow.field(column).type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _is_text(kind: pyarrow.DataType) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_binary(kind: pyarrow.DataType) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _fields(kind: pyarrow.DataType) -> dict[str, pyarrow.DataType]:
    """Fields of a struct; empty for any other type."""
    if not pyarrow.types.is_struct(kind):
        return {}
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}


def _holds_images(kind: pyarrow.DataType) -> bool:
    return _is_binary(kind) or any(name == "bytes" and _is_binary(each) for name, each in _fields(kind).items())


def _has_path(kind: pyarrow.DataType) -> bool:
    return any(name == "path" and _is_text(each) for name, each in _fields(kind).items())


def _all_null(file: ParquetFile, group: int, column: str) -> bool:
    """Whether no row of the group has image bytes, in which case the table has only file names."""
    described = file.metadata.row_group(group)
    for number in range(described.num_columns):
        found = described.column(number)
        if found.path_in_schema == column:
            statistics = found.statistics
            return statistics is not None and statistics.has_null_count and statistics.null_count == found.num_values
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
