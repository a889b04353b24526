"""The safetensors files of a model, and their tensors, read by byte range."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data import DataError, DataLost
from ...data.retry import call
from ..errors import RunError

_SINGLE_FIRST = "model"
"""transformers prefers `model.safetensors` over an index, which remains when a folder is re-saved as one file."""
_INDEX_FIRST = "diffusion_pytorch_model"
"""diffusers prefers the index; re-saving as one file removes the shards but keeps the index."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_OTHERS = {
    ".gguf": "GGUF, which is quantized: use the model's safetensors files",
    ".bin": "PyTorch pickles: convert them to safetensors (load and save_pretrained with the model's library)",
    ".pt": "PyTorch pickles: convert them to safetensors",
    ".pth": "PyTorch pickles: convert them to safetensors",
    ".ckpt": "PyTorch pickles: convert them to safetensors",
    ".msgpack": "Flax weights: use the model's safetensors files",
    ".h5": "TensorFlow weights: use the model's safetensors files",
    ".onnx": "an ONNX graph: use the model's safetensors files",
}
"""Other weight formats, and the remedy."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, chosen as transformers and diffusers do, or the single file `path`.

    RunError names the missing file, or what the folder contains instead.
    """
    if path.is_file():
        return [path]
    single, index = path / f"{_SINGLE_FIRST}.safetensors", path / f"{_SINGLE_FIRST}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file() and (files := _indexed(index)):
        return files
    single, index = path / f"{_INDEX_FIRST}.safetensors", path / f"{_INDEX_FIRST}.safetensors.index.json"
    if index.is_file():
        try:
            if files := _indexed(index):
                return files
        except RunError:
            if not single.is_file():  # else the index is left over from an earlier save
                raise
    if single.is_file():
        return [single]
    found = sorted(path.glob("*.safetensors"))
    variants = [file for file in found if re.match(rf"({_SINGLE_FIRST}|{_INDEX_FIRST})\.", file.name)]
    if found and len(variants) == len(found):
        plain = variants[0].name.split(".")[0] + ".safetensors"
        raise RunError(
            f"{path}: contains only a variant, {variants[0].name}; fetch {plain}, or rename the variant to it"
        )
    if not found:
        raise RunError(f"{path}: no safetensors files there{other_format_hint(path)}")
    found = [file for file in found if file not in variants]
    for shard in filter(None, (_SHARD.fullmatch(file.name) for file in found)):
        stem, _, count = shard.groups()
        for number in range(1, int(count) + 1):
            if not (file := path / f"{stem}-{number:05d}-of-{count}.safetensors").is_file():
                raise RunError(f"{file}: missing, one of the model's {int(count)} files; fetch it again")
    return found


def _indexed(index: Path) -> list[Path]:
    """The files named by an index; empty for an empty index."""
    try:
        stated = json.loads(call(lambda: index.read_text(encoding="utf-8"), index))
        where: list[str] = list(stated.get("weight_map", {}).values())
    except DataError:  # a storage error
        raise
    except (ValueError, AttributeError) as error:
        raise RunError(f"{index}: not a weight index ({error}); fetch it again") from error
    names = sorted(set(where))
    for name in names:
        # An index is untrusted input: it may only name files in its own folder.
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in ("", ".."):
            raise RunError(f"{index}: names {name!r}, which is not a file in this folder; fetch the model again")
        if not (index.parent / name).is_file():
            raise RunError(
                f"{index.parent}: {where.count(name)} tensors are missing: {index.name} names {name}, which does not"
                " exist; fetch it again"
            )
    return [index.parent / name for name in names]


def other_format_hint(path: Path) -> str:
    """Weights of another format in a folder, and the remedy; empty if there are none."""
    if not path.is_dir():
        return ""
    for file in sorted(path.iterdir()):
        if (what := _OTHERS.get(file.suffix)) and file.name != "training_args.bin":
            return f"; {file.name} is {what}"
    return ""


class _Entry(NamedTuple):
    """Where a tensor is stored."""

    file: _File
    kind: str
    """Data type in safetensors' notation."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    size: int
    """Bytes."""


class _File:
    """One safetensors file: its header, and ranges of its bytes.

    Ranges are read with `pread`, not memory-mapped: a storage failure under a mapped page, or a truncated file, kills
    the process with SIGBUS, without retry or message. A read that fails transiently reopens the file, because a stale
    handle stays stale, and continues only if the file is unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: io.FileIO | None = None
        self._seen: tuple[int, int] | None = None
        self.tensors, self.metadata = call(self._header, path)

    def read(self, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes from offset `start`. DataLost, DataError or RunError with the file's name."""
        call(lambda: self._read(start, view), self.path)

    def read_ahead(self, start: int, size: int) -> None:
        """Let the kernel read a range into its cache, so that `read` does not wait for it. Only a hint."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor(), start, size, os.POSIX_FADV_WILLNEED)

    def _header(self) -> tuple[dict[str, _Entry], Mapping[str, str]]:
        with safe_open(self.path, framework="pt") as checked:  # safetensors validates the header
            metadata = checked.metadata() or {}
        length = bytearray(8)
        self._read(0, memoryview(length))
        text = bytearray(int.from_bytes(length, "little"))
        self._read(8, memoryview(text))
        entries = {}
        for name, about in json.loads(text).items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                shape = tuple(about["shape"])
                entries[name] = _Entry(self, about["dtype"], shape, 8 + len(text) + begin, end - begin)
        return entries, metadata

    def _read(self, start: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor(), [view[done:]], start + done)
                if not count:
                    raise RunError(f"{self.path}: ends {len(view) - done} bytes early; fetch or write it again")
                done += count
        except OSError:
            if self._opened:
                with contextlib.suppress(OSError):
                    self._opened.close()
                self._opened = None
            raise

    def _descriptor(self) -> int:
        if self._opened is None:
            opened = io.FileIO(self.path)
            about = os.fstat(opened.fileno())
            seen = about.st_size, about.st_mtime_ns
            if self._seen not in (None, seen):
                opened.close()
                raise DataLost(f"{self.path}: replaced while being read; start again")
            self._opened, self._seen = opened, seen
        return self._opened.fileno()


class StoredTensors:
    """Tensors of safetensors files by name, as stored; read on demand."""

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._files: list[_File] = []
        for path in files:
            try:
                file = _File(path)
            except DataError as error:
                if error.transient:
                    raise
                raise RunError(str(error)) from error
            except (OSError, SafetensorError) as error:
                raise RunError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from error
            self._files.append(file)
            self._entries.update(file.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def dtype(self, name: str) -> torch.dtype | None:
        """None for a type that torch lacks, such as four-bit floats."""
        return _DTYPES.get(self._entries[name].kind)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in memory."""
        shape = self.shape(name)
        return self.flat(name, 0, math.prod(shape)).view(shape)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened tensor; only those bytes are read."""
        entry, dtype = self._entries[name], self.dtype(name)
        if dtype is None:
            raise RunError(f"{entry.file.path}: {name} is stored as {entry.kind}, a type that cannot be read here")
        found = torch.empty(max(0, hi - lo), dtype=dtype)
        self.fill(found, name, lo)
        return found

    def fill(self, out: Tensor, name: str, lo: int) -> None:
        """Read the elements from `lo` of the flattened tensor into `out`: 1-D, contiguous, of its type, on the CPU."""
        entry = self._entries[name]
        assert out.dtype == self.dtype(name)
        if len(out):
            assert lo >= 0 and (lo + len(out)) * out.dtype.itemsize <= entry.size
            entry.file.read(entry.start + lo * out.dtype.itemsize, out.view(torch.uint8).numpy().data)

    def read_ahead(self, name: str, lo: int, count: int) -> None:
        """Announce reads of `count` bytes from byte `lo` of a tensor, which may end in the next tensors."""
        entry = self._entries[name]
        entry.file.read_ahead(entry.start + lo, count)

    def place(self, name: str) -> tuple[int, int]:
        """First byte of a tensor in its file, and number of its bytes."""
        entry = self._entries[name]
        return entry.start, entry.size

    def metadata(self) -> Iterator[Mapping[str, str]]:
        """The `__metadata__` of each file's header."""
        return (file.metadata for file in self._files)
