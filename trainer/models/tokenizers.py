"""Tokenizers from a model's folder, refused when they would give every caption the same tokens.

transformers 5 builds a tokenizer of the special tokens alone where the vocabulary's files are missing, without a word.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...data.retry import described
from ..errors import RunError

SENTENCE = "a red apple"
"""What every tokenizer of captions must give back."""


def open_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer in `folder`, for an embedding of `rows`. RunError unless it is whole and that model's."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its many readers raise many kinds
        raise RunError(f"{folder}: no tokenizer can be read there; {_remedy(folder, error)}") from error
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if " ".join(back.lower().split()) != SENTENCE:
        raise RunError(
            f"{folder}: the tokenizer there has no vocabulary: {SENTENCE!r} comes back as {back!r};"
            f" fetch {_vocabulary(tokenizer, folder)}"
        )
    if len(ids) >= len(SENTENCE):
        raise RunError(
            f"{folder}: the tokenizer there splits {SENTENCE!r} into {len(ids)} tokens, its merges are missing;"
            f" fetch {_vocabulary(tokenizer, folder)}"
        )
    # Embeddings are padded by a few rows (Qwen2.5-VL 399, T5 28), never by a tenth.
    if not 0.9 * rows <= len(tokenizer) <= rows:
        raise RunError(
            f"{folder}: the tokenizer there has {len(tokenizer)} tokens and the model's embedding {rows} rows; fetch"
            " this model's own tokenizer"
        )
    return tokenizer


def _vocabulary(tokenizer: Any, folder: Path) -> str:
    """The files that hold this kind's vocabulary and are not in the folder."""
    known: dict[str, str] = tokenizer.vocab_files_names
    apart = [name for kind, name in known.items() if kind != "tokenizer_file" and not (folder / name).is_file()]
    whole = known.get("tokenizer_file", "tokenizer.json")
    if (folder / whole).is_file():
        return f"{whole} again"
    return " or ".join(filter(None, (whole, " and ".join(apart))))


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
