"""Tokenizers of a model folder, refused if they would map every caption to the same tokens.

If the vocabulary files are missing, transformers 5 silently builds a tokenizer of the special tokens only.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...data.retry import described
from ..errors import RunError

SENTENCE = "a red apple"
"""A caption that every tokenizer must round-trip."""


def open_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer in `folder`, for an embedding of `rows`. RunError unless it is complete and matches that model."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its many readers raise many types
        raise RunError(f"{folder}: the tokenizer cannot be read; {_remedy(folder, error)}") from error
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if " ".join(back.lower().split()) != SENTENCE:
        raise RunError(
            f"{folder}: the tokenizer has no vocabulary: {SENTENCE!r} decodes to {back!r};"
            f" fetch {_vocabulary(tokenizer, folder)}"
        )
    if len(ids) >= len(SENTENCE):
        raise RunError(
            f"{folder}: the tokenizer splits {SENTENCE!r} into {len(ids)} tokens, its merges are missing;"
            f" fetch {_vocabulary(tokenizer, folder)}"
        )
    # Embeddings are padded by a few rows (Qwen2.5-VL 399, T5 28), never by a tenth.
    if not 0.9 * rows <= len(tokenizer) <= rows:
        raise RunError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model's embedding {rows} rows; fetch"
            " this model's own tokenizer"
        )
    return tokenizer


def _vocabulary(tokenizer: Any, folder: Path) -> str:
    """The missing vocabulary files of this tokenizer class."""
    known: dict[str, str] = tokenizer.vocab_files_names
    separate = [name for kind, name in known.items() if kind != "tokenizer_file" and not (folder / name).is_file()]
    single = known.get("tokenizer_file", "tokenizer.json")
    if (folder / single).is_file():
        return f"{single} again"
    return " or ".join(filter(None, (single, " and ".join(separate))))


def _remedy(folder: Path, error: Exception) -> str:
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        for package in ("sentencepiece", "google.protobuf"):
            if not _installed(package):
                name = package.removeprefix("google.")
                return f"spiece.model needs the package {name} (pip install {name}), or fetch tokenizer.json"
    if not (folder / "tokenizer.json").is_file():
        return f"fetch tokenizer.json, which is missing ({described(error)})"
    return f"fetch the model's tokenizer files again ({described(error)})"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
