"""Where files that belong to a shard are stored, such as its index: next to it, or in a folder of their own.

In such a folder (`data.index_dir`) the path of a file is the whole address that it would have next to the shard, so
that shards of equal names in different folders have different indexes: with the folder `own`, that of
`s3://bucket/a/x.tar` is `own/s3/bucket/a/x.index.jsonl`, and that of `/data/x.tar` is `own/file/data/x.index.jsonl`.
"""

from __future__ import annotations

import re

from .remote import filesystem, protocol

_UNUSUAL = re.compile(r'[%:*?#\[\]{}\\|"<>\x00-\x1f]')
"""Characters that would mean something else in a path or URL."""


def place_of(url: str, index_dir: str | None) -> str:
    """The path or URL at which a file that belongs at `url` is stored. Raises DataError for an unknown protocol."""
    if index_dir is None:
        return url
    fs, path = filesystem(url)
    scheme, _, rest = path.rpartition("://")  # only some drivers leave the scheme in the path
    scheme = url.partition("://")[0] if "::" in url else scheme or protocol(fs)
    if scheme.startswith("http"):
        rest = re.sub(r"^[^/@]*@", "", rest)  # a login
    parts = [scheme, *rest.lstrip("/").split("/")]
    return "/".join([index_dir.rstrip("/"), *map(_name, parts)])


def option(index_dir: str | None) -> str:
    """`index_dir` as an option of `bifrost data`, for messages that name a command."""
    return f" --index-dir {index_dir}" if index_dir else ""


def _name(part: str) -> str:
    """One folder or file of an address as the name of one; different ones have different names."""
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    return _UNUSUAL.sub(lambda found: f"%{ord(found[0]):02X}", part)
