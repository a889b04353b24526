"""The tiny model's tokenizer: byte-level BPE over the scenes' captions, with Qwen's markers and chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SYSTEM = "You are a helpful assistant."
DESCRIBE = "Describe this image."
# Qwen's chat template, for text only.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    captions: Iterable[str], dialogues: Iterable[str], vocabulary: int, folder: Path
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with up to `vocabulary` tokens on the captions, on questions and answers, and on the template's
    words, and save it to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fixed = [SYSTEM, DESCRIBE, "system", "user", "assistant"] * 100
    captions = list(captions)  # preceded by a space in the instruction, but not as an answer
    texts = [f"Generate an image of {caption}" for caption in captions]
    tokenizer.train_from_iterator([*fixed, *texts, *captions, *dialogues], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    return wrapped
