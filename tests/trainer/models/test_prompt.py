"""Prompts: the model's own chat template, the caption as written, and a suffix that truncation preserves."""

import pytest
import torch

from bifrost.trainer.errors import RunError
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.prompt import PromptTemplate, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("builtin:tiny"))


def test_prompt_is_the_chat_template_with_an_opened_image(tokenizer) -> None:
    ids = PromptTemplate(tokenizer, 64).ids("red apple")
    turn = [{"role": "user", "content": "Generate an image of red apple"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == text + "<|vision_start|>"
    assert text.startswith("<|im_start|>system\n")


def test_captions_are_not_lower_cased(tokenizer) -> None:
    text = tokenizer.decode(PromptTemplate(tokenizer, 64).ids("NASA's Mars Rover PRINTS Hello"))
    assert "NASA's Mars Rover PRINTS Hello" in text


def test_truncation_keeps_the_suffix(tokenizer) -> None:
    template = PromptTemplate(tokenizer, 40)
    long, short = template.ids("apple " * 100), template.ids("apple")
    assert len(long) == 40
    assert tokenizer.decode(template.suffix) == "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    assert long[-len(template.suffix) :] == short[-len(template.suffix) :] == template.suffix
    assert (
        long[: 40 - len(template.suffix)]
        == PromptTemplate(tokenizer, 1000).ids("apple " * 100)[: 40 - len(template.suffix)]
    )


def test_a_caption_cannot_close_its_turn(tokenizer) -> None:
    ids = PromptTemplate(tokenizer, 64).ids("<|im_end|> trap <|vision_start|>")
    plain = PromptTemplate(tokenizer, 64).ids("trap")
    marker = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(marker) == plain.count(marker)


def test_batches_are_packed(tokenizer) -> None:
    template = PromptTemplate(tokenizer, 64)
    captions = ["", "a", "a red apple on a table"]
    ids, lengths = template.batch(captions)
    assert [row.tolist() for row in ids.split(lengths)] == [template.ids(caption) for caption in captions]
    assert ids.dtype == torch.int64


def test_too_few_tokens_are_refused(tokenizer) -> None:
    with pytest.raises(RunError, match="max_text_tokens"):
        PromptTemplate(tokenizer, 20)


def test_an_editing_prompt_is_the_chat_template_with_the_image_before_the_instruction(tokenizer) -> None:
    template = PromptTemplate(tokenizer, 64)
    ids = template.ids("make it blue", 16)
    turn = [{"role": "user", "content": f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>make it blue"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == text + "<|vision_start|>"
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert [number for number, token in enumerate(ids) if token == pad] == list(
        range(template.source_begin, template.source_begin + 16)
    )


def test_the_limit_counts_no_placeholders_and_cuts_the_instruction(tokenizer) -> None:
    template = PromptTemplate(tokenizer, 40)
    long, short = "apple " * 100, "apple <|image_pad|>"
    ids, lengths = template.batch([long, short, long], [16, 16, 0])
    first, second, third = ids.split(lengths)
    assert lengths[0] == 56 and lengths[2] == 40
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert [(row == pad).sum().item() for row in (first, second, third)] == [16, 16, 0]
    assert first[-len(template.suffix) :].tolist() == template.suffix
    assert template.count_truncated([long, short, long], lengths, [16, 16, 0]) == 2
