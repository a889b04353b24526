"""The shards that paths, folders, URLs and patterns name."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator

from .errors import DataError
from .files import is_local
from .local import is_kind
from .remote import filesystem
from .retry import call
from .wildcards import matches

HELD_OUT = ("dev", "eval", "heldout", "test", "val", "valid", "validation")
"""First words of the names of held-out shards."""
WILDCARDS = "*?["
NOTHING_NAMED = "no shards named; give a path such as /data/train-{00000..00099}.tar"


def format_shards(shards: list[str]) -> str:
    """Shards as errors name them: the first, and the number of others."""
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"


def patterns(spec: str | list[str]) -> Iterator[str]:
    """The paths, folders, URLs and wildcards in `spec`, with braces and `~` expanded."""
    from braceexpand import braceexpand  # here: an exported pipeline opens no shards, and runs without it

    for one in [spec] if isinstance(spec, str) else spec:
        if not one.strip():  # fsspec reads it as the current folder
            raise DataError(NOTHING_NAMED)
        try:
            for pattern in braceexpand(one):
                yield os.path.expanduser(pattern)  # wildcards need quotes, in which a shell does not expand `~`
        except ValueError as error:
            raise DataError(f"{one}: {error}; write ranges as {{00000..02047}}") from None


def expand(spec: str | list[str], mixed: bool = True) -> list[str]:
    """Sorted shards that a path, folder, URL or list of them names, with braces and wildcards expanded.

    A folder means the shards in it, not those in its subfolders. mixed: whether a folder may hold held-out shards
    together with others. Raises DataError when a folder or wildcard has no shards or a shard is named twice.
    """
    shards: list[str] = []
    folders: set[str] = set()
    for pattern in patterns(spec):
        if is_shard(pattern):
            if (folder := posixpath.dirname(pattern)) not in folders:
                filesystem(pattern)  # raises for an unknown protocol
                folders.add(folder)
            shards.append(pattern)
        else:
            shards += call(lambda pattern=pattern: _matches(pattern, mixed), pattern)
    shards.sort()
    check_sorted(shards)
    return shards


def check_sorted(shards: list[str]) -> None:
    """DataError when sorted shards are none, repeat one, or contain something else."""
    if not shards:
        raise DataError(NOTHING_NAMED)
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        if shard == after:
            raise DataError(f"{shard}: named twice; name each shard once")
        if not shard.endswith(".tar"):
            raise DataError(
                f"{shard}: neither a shard nor a folder; name .tar files, with braces or wildcards, or their folder"
            )


def is_shard(pattern: str) -> bool:
    """Whether a pattern is the path of a single shard."""
    return pattern.endswith(".tar") and not has_wildcard(pattern)


def has_wildcard(pattern: str) -> bool:
    return any(mark in pattern for mark in WILDCARDS)


def folder_of(shard: str) -> str:
    """The path or URL of a shard's folder, with the final slash; empty for the working directory."""
    return shard[: shard.rfind("/") + 1]


def _matches(pattern: str, mixed: bool) -> list[str]:
    fs, path = filesystem(pattern)
    local = is_local(pattern)
    if has_wildcard(pattern):
        found = {item["name"]: item for item in matches(path)} if local else fs.glob(path, detail=True)
        nothing = "no .tar matches"
    elif not pattern.endswith(".tar") and (is_kind(path, stat.S_ISDIR) if local else fs.isdir(path)):
        found, nothing = {item["name"]: item for item in fs.ls(path, detail=True)}, "a folder without .tar files"
        if not mixed:
            refuse_mixture(pattern, list(found))
    else:
        return [pattern]
    shards = [
        str(name)
        for name, item in found.items()
        if str(name).endswith(".tar")
        and (item["type"] == "file" or item.get("islink"))  # opening a FIFO would block
        and not posixpath.basename(str(name)).startswith(".")
    ]
    if not shards:
        raise DataError(
            f"{pattern}: {nothing}{seen_from(pattern)}; check the path, or make shards with `bifrost data ingest`"
        )
    return shards if local else [fs.unstrip_protocol(shard) for shard in shards]


def seen_from(path: str) -> str:
    """The working directory of a relative path, for messages: a run may be resumed from another folder."""
    return "" if not is_local(path) or os.path.isabs(path) else f", relative to {os.getcwd()}"


def refuse_mixture(folder: str, names: list[str]) -> None:
    """Raise DataError for a folder with held-out shards and others, so that held-out data is not trained on."""
    shards = [posixpath.basename(name) for name in names if name.endswith(".tar")]
    stems = [re.split(r"[-_.0-9]", shard)[0].lower() for shard in shards if not shard.startswith(".")]
    held_out = sorted({stem for stem in stems if stem in HELD_OUT})
    if held_out and len(others := sorted(set(stems))) > 1:
        sets = ", ".join(f"{stem}*.tar" for stem in others)
        example = f"{folder.rstrip('/')}/{others[-1]}*.tar"
        raise DataError(f"{folder}: holds several sets of shards ({sets}); name one, such as '{example}'")
