"""Tables for tests of ingest: the same rows as CSV, JSON lines or Parquet."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows in the format of the path's extension; Parquet in row groups of 50."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    return path
