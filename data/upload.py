"""Shards written to an object store: made on the local disk, then sent, so that they appear once they are complete."""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from .errors import DataError, DataLost, DataMissing
from .files import is_local
from .index import index_path
from .remote import filesystem, has_requests, protocol, size_of
from .retry import call


def sender(address: str) -> tuple[Any, str]:
    """fsspec's file system for sending files to an address, and the path in it; raises DataError when there is none.

    With a client that repeats requests, unlike `remote.filesystem`: a file is sent in many, of which one may fail.
    """
    try:
        if not address.startswith(("s3:", "s3a:")):
            return url_to_fs(address)
        timeouts = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 2}}
        fs, path = url_to_fs(address, use_listings_cache=False, config_kwargs=timeouts)
        fs.retries = 2
        return fs, path
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: {error}; check the address, or install the package that serves it") from None


def require_store(url: str) -> None:
    """DataError for a URL that is neither local nor in an object store, where a file appears once it is complete."""
    if not is_local(url) and (not has_requests(url) or protocol(filesystem(url)[0]) == "http"):
        raise DataError(
            f"{url}: shards are written to a local folder or to an object store, such as s3://bucket/folder"
        )


@contextmanager
def staged(url: str) -> Iterator[Path]:
    """A local path at which to write the shard for `url` and its index: its own, or one on the temporary disk, from
    which they are sent when the block ends without an error. Raises DataError or DataLost."""
    if is_local(url):
        yield Path(filesystem(url)[1])
        return
    with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
        file = Path(folder, posixpath.basename(url))
        yield file
        remove(index_path(url))  # an index must never be next to another tar than its own
        _send(file, url)
        _send(Path(index_path(str(file))), index_path(url))


def _send(file: Path, url: str) -> None:
    fs, path = sender(url)
    call(lambda: fs.put_file(str(file), path), url)
    size = file.stat().st_size
    if (there := call(lambda: size_of(url), url)) != size:
        raise DataLost(f"{url}: has {there} bytes after {size} were sent; check the storage")


def remove(url: str) -> None:
    """Remove a file or object, if it exists. Raises DataError or DataLost."""
    if is_local(url):
        Path(filesystem(url)[1]).unlink(missing_ok=True)
        return
    fs, path = filesystem(url)
    with suppress(DataMissing):
        call(lambda: fs.rm_file(path), url)
