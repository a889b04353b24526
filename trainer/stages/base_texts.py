"""Micro-batches of an understanding source: texts, or questions with their answers."""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data import Item, stacked
from ..models.prompt import IMAGE, QuestionTemplate, without_control_tokens


class BaseTextCollate:
    """Items of a micro-batch -> arguments of `PatchLatentModel.base_loss`; runs in the loader workers.

    Predicted are all tokens of a text but its first, or those of an answer with the end of its turn. `limit` tokens are
    used of a text, of an answer, and of a question with its template, whose placeholders of an image do not count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patches: int, limit: int) -> None:
        """patches: latents of an image."""
        self.tokenizer, self.patches, self.limit = tokenizer, patches, limit
        self.about_image, self.alone = (QuestionTemplate(tokenizer, each) for each in (patches, 0))
        self.placeholder: Any = tokenizer.convert_tokens_to_ids(IMAGE)

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """input_ids int64 [sum T], text_lengths; rows, targets int64 [R]: rows of the packed tokens from which a next
        token is predicted, and these tokens; images uint8 [B, 3, S, S], and source_begins, the numbers of their first
        placeholders among the tokens of each prompt, if the questions have images."""
        ids: list[int] = []
        lengths: list[int] = []
        rows: list[int] = []
        begins: list[int] = []
        for item in items:
            before, predicted = self.tokens(item)
            first = len(ids) + max(len(before), 1) - 1
            ids += [*before, *predicted]
            rows += range(first, len(ids) - 1)
            lengths.append(len(before) + len(predicted))
            if item.image.size:
                begins.append(before.index(self.placeholder))
        packed, predicting = torch.tensor(ids, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64)
        found = {"input_ids": packed, "text_lengths": tuple(lengths), "rows": predicting}
        found["targets"] = packed[predicting + 1]
        if begins:
            found |= {"images": stacked([item.image for item in items]), "source_begins": tuple(begins)}
        return found

    def tokens(self, item: Item) -> tuple[list[int], list[int]]:
        """The tokens of one prompt: those that are given, and those that are predicted, of a text all."""
        text = without_control_tokens(item.caption)
        if item.question is None:
            return [], self.tokenizer.encode(text, add_special_tokens=False)[: self.limit]
        template, patches = (self.about_image, self.patches) if item.image.size else (self.alone, 0)
        question = template.question(without_control_tokens(item.question))
        if len(question) > (most := self.limit + patches):
            question = question[: most - len(template.suffix)] + template.suffix
        return question, template.answer(text)[: self.limit]
