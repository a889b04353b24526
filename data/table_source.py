"""Tables as ingest sources: of file names in a folder, or of the images themselves."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .candidates import Candidate, Source, image_file, key_of, state_of
from .errors import DataError
from .local import with_retries
from .source_images import SOURCE_IMAGE
from .tables import Columns, Row, read_table

if TYPE_CHECKING:
    from .parquet import RowBytes


def one_split(root: Path, tables: list[Path]) -> list[Path]:
    """`tables`, when all are of one split by Hugging Face's names (`train-00000-of-00003.parquet`); else DataError."""
    splits = sorted(
        {re.sub(r"-\d+-of-\d+$", "", table.stem) for table in tables if re.search(r"-\d+-of-\d+$", table.stem)}
    )
    if len(splits) > 1:
        folder = os.path.commonpath([table.parent for table in tables])
        raise DataError(
            f"{root}: holds the splits {', '.join(splits)}; name one, such as '{folder}/{splits[-1]}-*.parquet'"
        )
    return tables


def table_source(root: Path, tables: list[Path], columns: Columns) -> Source:
    source, seen, captions, read, unreadable, url = Source(), hashlib.sha256(), 0, 0, 0, None
    for table in tables:
        rows = read_table(table, columns)
        seen.update(state_of(table).encode() if table.suffix == ".parquet" else with_retries(table.read_bytes, table))
        for row in rows:
            read += 1
            if row.problem:
                unreadable += 1
                source.rejected.append((row.where, row.problem))
                continue
            captions += any(each not in (None, "", b"") for each in (row.caption, *row.other_captions))
            name = _name_or_bytes(row.image)
            if hasattr(name, "read"):
                found = _embedded(table, row, name)
            elif not isinstance(name, str) or not name.strip():
                source.rejected.append((row.where, "no file name in its image column"))
                continue
            else:
                url = url or (name if "://" in name else None)
                key = key_of(os.path.relpath(os.path.join(root, name), root)) if "\0" not in name else row.where
                image = image_file(root, name, seen)
                if isinstance(image, str):
                    source.rejected.append((key, image))
                    continue
                found = Candidate(key, dict([image]), row.caption, other_captions=row.other_captions)
            if columns.source is not None:
                found = _with_source_image(found, root, _name_or_bytes(row.source), seen)
            if isinstance(found, Candidate):
                source.candidates.append(found)
            else:
                source.rejected.append(found)
    first = tables[0] if len(tables) == 1 else tables[0].parent
    if not read:
        raise DataError(f"{first}: no rows; give a table that names images")
    if not source.candidates:
        if url:
            raise DataError(f"{first}: holds URLs ({url}) instead of files; download the images first")
        key, reason = source.rejected[0]
        if unreadable == read:
            raise DataError(f"{first}: no row can be read, the first: {key}: {reason}")
        raise DataError(f"{first}: no image of its rows is in {root} ({key}: {reason}); check SRC and the column")
    if not captions:
        raise DataError(f"{first}: no captions in the caption column; name another column with --caption-column")
    source.state = seen.hexdigest()
    return source


def _name_or_bytes(value: Any) -> Any:
    """A file name or `RowBytes` in a column of images, or something else that is neither."""
    return value.get("path") if isinstance(value, dict) else value  # Hugging Face's image objects in JSON


def _with_source_image(found: Candidate, root: Path, name: Any, seen: hashlib._Hash) -> Candidate | tuple[str, str]:
    """The candidate with its source image; or its key, and why it has none."""
    if hasattr(name, "read"):
        return replace(found, source_image=name)
    if not isinstance(name, str) or not name.strip():
        return found.key, f"{SOURCE_IMAGE}no file name in its column"
    listed = image_file(root, name, seen)
    if isinstance(listed, str):
        return found.key, f"{SOURCE_IMAGE}{listed}"
    kind, piece = listed
    return replace(found, members={**found.members, f"source.{kind}": piece})


def _embedded(table: Path, row: Row, image: RowBytes) -> Candidate:
    number = f"{table.stem}/{int(row.where.rpartition(' ')[2]) - 1:08d}"
    key = key_of(os.path.basename(image.name)) if image.name else number
    return Candidate(key, {}, row.caption, image=image, other_captions=row.other_captions, other_key=number)
