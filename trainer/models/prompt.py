"""Captions, and questions about an image, as token ids in the model's chat template."""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RunError
from .backbone import read_config
from .tokenizers import open_tokenizer

INSTRUCTION = "Generate an image of {caption}"
IMAGE_START = "<|vision_start|>"
IMAGE = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Qwen2.5-VL folder; RunError if it is incomplete or another model's."""
    config = read_config(folder)
    tokenizer = open_tokenizer(folder, config.text_config.vocab_size)
    for token, wanted in ((IMAGE_START, config.vision_start_token_id), (IMAGE, config.image_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found in (None, tokenizer.unk_token_id):
            raise RunError(f"{folder}: the tokenizer has no {token}; a Qwen2.5-VL tokenizer is needed")
        if found != wanted:
            raise RunError(
                f"{folder}: {token} is token {found} of the tokenizer and {wanted} in config.json; fetch this model's"
                " own tokenizer"
            )
    if not tokenizer.chat_template:
        raise RunError(
            f"{folder}: the tokenizer has no chat template; fetch tokenizer_config.json or chat_template.jinja"
        )
    return tokenizer


def placeholders(patches: int) -> str:
    """Of an image with `patches` latents, as Qwen2.5-VL reads one; empty without an image."""
    return f"{IMAGE_START}{IMAGE * patches}{IMAGE_END}" if patches else ""


def without_control_tokens(text: str) -> str:
    """Text of the data within a template, whose control tokens it must not have: a caption could end its turn."""
    return text.replace("<|", "< |")


class PromptTemplate:
    """Turns captions, and instructions for a source image, into token ids.

    A prompt is the model's system turn, a user turn with the instruction, and an open assistant turn that ends with the
    image-start token. For an editing pair, the user turn has the source image's placeholders and then the instruction
    as it is. Truncation to `max_tokens`, placeholders not included, removes the end of the caption, never the end of
    the user turn or anything after it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        turn = [{"role": "user", "content": INSTRUCTION.format(caption=_MARK)}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        if text.count(_MARK) != 1:
            raise RunError(f"{tokenizer.name_or_path}: the chat template omits the user message; fetch it again")
        self.head, self.tail = (text + IMAGE_START).split(_MARK)
        self.opening = self.head.removesuffix(INSTRUCTION.format(caption=""))
        self.suffix: list[int] = tokenizer.encode(self.tail, add_special_tokens=False)
        placeholder: Any = tokenizer.convert_tokens_to_ids(IMAGE)
        self.source_begin = self._encode("", 1).index(placeholder)
        """Number of the first placeholder of a source image among the tokens of its prompt."""
        shortest = max(self.count_tokens(""), self.count_tokens("", 1))
        if shortest > max_tokens:
            raise RunError(
                f"branch.max_text_tokens is {max_tokens}, but the empty prompt has {shortest} tokens: raise it"
            )

    def ids(self, caption: str, patches: int = 0) -> list[int]:
        """Token ids of one prompt, at most `max_tokens` and the `patches` of a source image."""
        ids, most = self._encode(caption, patches), self.max_tokens + patches
        if len(ids) > most:
            ids = ids[: most - len(self.suffix)] + self.suffix
        return ids

    def count_tokens(self, caption: str, patches: int = 0) -> int:
        """Tokens of the prompt before truncation to `max_tokens`, without the `patches` of a source image."""
        return len(self._encode(caption, patches)) - patches

    def count_truncated(
        self, captions: Sequence[str], lengths: Sequence[int], patches: Sequence[int] | None = None
    ) -> int:
        """How many of `captions`, whose prompts have `lengths` tokens, lost their end. patches: as for `batch`."""
        found = zip(captions, lengths, patches or [0] * len(captions), strict=True)
        full = ((caption, some) for caption, length, some in found if length == self.max_tokens + some)
        return sum(self.count_tokens(*each) > self.max_tokens for each in full)

    def _encode(self, caption: str, patches: int = 0) -> list[int]:
        caption = without_control_tokens(caption)
        head = self.opening + placeholders(patches) if patches else self.head
        return self.tokenizer.encode(head + caption + self.tail, add_special_tokens=False)

    def batch(self, captions: Sequence[str], patches: Sequence[int] | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """The concatenated prompts, input_ids [sum T], and their lengths. patches: of each caption's source image, 0
        without one; None: there are none."""
        rows = [self.ids(*each) for each in zip(captions, patches or [0] * len(captions), strict=True)]
        return torch.tensor(list(itertools.chain(*rows)), dtype=torch.int64), tuple(map(len, rows))


class QuestionTemplate:
    """Turns questions about an image, and their answers, into token ids.

    A question is the model's system turn, a user turn with the image's `patches` placeholders and the question, and an
    open assistant turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patches: int) -> None:
        """patches: 0 for questions without an image."""
        self.tokenizer = tokenizer
        turn = [{"role": "user", "content": f"{placeholders(patches)}{_MARK}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        self.head, self.tail = text.split(_MARK)
        self.suffix: list[int] = tokenizer.encode(self.tail, add_special_tokens=False)
        self.end: Any = tokenizer.eos_token_id

    def question(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.head + text + self.tail, add_special_tokens=False)

    def answer(self, text: str) -> list[int]:
        """The answer and the end of its turn, which follow the question."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end]
