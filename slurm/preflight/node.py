"""Checks that a node makes alone: GPUs, folders, disk space, host names, versions, and the site's own command."""

from __future__ import annotations

import os
import platform
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ...data.errors import DataError
from ...data.local import is_kind, stat_of
from ...data.retry import call
from ...recipes import RecipeError, load_recipe
from ..job import RECIPE
from ..named_paths import local_shards, require_paths
from ..software import all_versions, digest, source_digest
from .devices import device_findings
from .finding import Finding, Limits
from .rank_info import RankInfo


def node_checks(
    me: RankInfo, run: Path | None, scratch: Sequence[str], command: str | None, limits: Limits
) -> Iterator[tuple[str, Callable[[], Sequence[Finding]]]]:
    """(name, check) of all checks that this node makes alone."""
    yield "GPUs", lambda: device_findings(me.devices, limits.idle_gib, me.bound)
    limited = partial(_folder, gib=limits.scratch_gib, inodes=limits.inodes, own=True)
    for name, folder in [("temp", tempfile.gettempdir()), *((f"scratch {each}", each) for each in scratch)]:
        yield name, lambda name=name, folder=Path(folder): [limited(name, folder)]
    if me.size > 1:
        yield "own name", lambda: [_resolve("own name", socket.gethostname(), own=True)]
        yield "rendezvous name", lambda: [_resolve("rendezvous name", me.host)]
    if command:
        yield "site command", lambda: [_command(command, limits.node_s / 2)]
    if run:
        yield "run folder", lambda: [_folder("run folder", run, limits.free_gib, limits.inodes)]
        yield "recipe and data", lambda: _recipe(run)
    yield "versions", _versions


def _folder(check: str, folder: Path, gib: float, inodes: int, own: bool = False) -> Finding:
    try:
        if not is_kind(folder, stat.S_ISDIR):
            return Finding(check, str(folder), f"{folder} is not a folder on this node", own)
        # Read the content back: a full or failing disk may accept only the name.
        with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder) as file:
            file.write(b"bifrost" * 1000)
            file.flush()
            os.fsync(file.fileno())
            written = Path(file.name).read_bytes() == b"bifrost" * 1000
        disk = os.statvfs(folder)
    except DataError as error:
        return Finding(check, str(folder), str(error), own)
    except OSError as error:
        return Finding(check, str(folder), f"{folder} cannot be written: {error.strerror or error}", own)
    if not written:
        return Finding(check, str(folder), f"{folder}: data read differs from data written", own)
    free = disk.f_bavail * disk.f_frsize / 2**30
    figure = f"{folder}: {free:.0f} GiB free"
    if free < gib:
        return Finding(check, figure, f"{folder}: {free:.2g} GiB free, {gib:g} required", own)
    # Some file systems do not count inodes: they report 0 of 0.
    if disk.f_files and disk.f_favail < inodes:
        return Finding(check, figure, f"{folder}: {disk.f_favail} inodes free, {inodes} required", own)
    return Finding(check, figure)


def _resolve(check: str, host: str, own: bool = False) -> Finding:
    try:
        return Finding(check, f"{host}: {socket.getaddrinfo(host, None)[0][4][0]}")
    except OSError as error:
        return Finding(check, host, f"{host} does not resolve: {error.strerror or error}", own)


def _command(command: str, seconds: float) -> Finding:
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return Finding("site command", "", f"preflight_command does not end within {seconds:g} s", own=True)
    if done.returncode == 0:
        return Finding("site command", "exit code 0")
    said = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "nothing on stderr")
    return Finding("site command", f"exit code {done.returncode}", said[:200], own=True)


def _recipe(run: Path) -> list[Finding]:
    """Check the recipe submitted for the run, or that of a run started without Slurm, and its local shards; shards
    behind a URL are skipped."""
    try:
        file = run / RECIPE if stat_of(run / RECIPE) else run / "recipe.yaml"
        text = call(lambda: file.read_text(encoding="utf-8"), file)
        recipe = load_recipe(file, stored=True)
        require_paths(Path(recipe.runs_dir) / recipe.name, recipe.previews, recipe.init_from)
    except (RecipeError, DataError) as error:
        return [Finding("recipe", "", str(error))]
    found = Finding("recipe", digest([text]), same=True)
    try:
        shards, sizes = local_shards(recipe.data.named)
    except DataError as error:
        return [found, Finding("data", "", str(error))]
    return [found, Finding("data", f"{len(shards)} shards ({digest([*shards, *map(str, sizes)])})", same=True)]


def _versions() -> list[Finding]:
    import torch
    from torch.cuda import nccl

    every = all_versions()
    versions = {
        "python": f"{platform.python_version()} {sys.executable}",
        "torch": torch.__version__,
        "deepspeed": every.get("deepspeed", "none"),
        "transformers": every.get("transformers", "none"),
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "none",
        "bifrost": f"{every.get('bifrost-train', 'none')} {source_digest()}",
        "packages": f"{len(every) - 1} ({digest(map('=='.join, every.items()))})",
    }
    return [Finding(name, version, same=True) for name, version in versions.items()]
