"""Questions about scenes, asked of the MLLM before and after stage 1: training must not change any of its answers.

Before: the model's own folder, loaded by transformers. After: the same class on the very tensors that generation uses.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from ...data.progress import progress
from ...data.scenes.questions import Question, questions
from ...recipes.fields import HeldWeights
from ..inference.latent_decoder import LatentDecoder
from ..models.backbone import FrozenBackbone, pixel_patches, read_config
from ..models.prompt import QuestionTemplate
from ..models.weights import WeightFiles
from .samples import stack
from .scene_samples import SceneSample

log = logging.getLogger(__name__)

AT_ONCE = 32
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Understanding:
    """Fractions of questions whose greedy answer is exactly the right one, by kind and of all."""

    n: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    equal: bool
    """Whether the logits of every answer are equal to the bit."""


@dataclass(frozen=True)
class _Asked:
    image: int
    question: Question


@torch.no_grad()
def measure_understanding(
    decoder: LatentDecoder, folder: Path, samples: Sequence[SceneSample], seed: int
) -> Understanding | None:
    """Answers to one question of each kind about every scene, chosen by the seed.

    folder: of the MLLM before stage 1. None, with a warning, if transformers cannot load it as a model that answers.
    """
    if reason := _cannot_answer(folder, decoder.mllm.backbone.held):
        log.warning("no questions are asked of the MLLM: %s %s", folder, reason)
        return None
    asked = [_Asked(number, drawn) for number, sample in enumerate(samples) for drawn in _drawn(sample, seed)]
    images = stack([sample.seen for sample in samples])
    template = QuestionTemplate(decoder.template.tokenizer, decoder.mllm.branch.side**2)
    with progress("answering", 2 * len(asked), "questions", shown=decoder.group.rank == 0) as shown:
        model = _load(folder, next(decoder.mllm.backbone.parameters()).dtype).to(decoder.device)
        share = partial(decoder.in_batches, len(asked), AT_ONCE)
        before = share(partial(_answers, model, template, asked, images), shown.advance)
        _use_weights(model, decoder.mllm.backbone)
        after = share(partial(_answers, model, template, asked, images), shown.advance)
    kinds = [each.question.kind for each in asked]
    right = [_accuracy(kinds, [is_right for is_right, _ in found]) for found in (before, after)]
    n = {kind: kinds.count(kind) for kind in sorted(set(kinds))} | {"all": len(kinds)}
    return Understanding(n, *right, equal=before == after)


def _cannot_answer(folder: Path, held: HeldWeights) -> str | None:
    """Why transformers' class cannot answer with these weights."""
    files, config = WeightFiles(folder), read_config(folder)
    if held != "bf16":
        return f"is held in 8 bits by the run (backbone.weights={held}), which transformers' class cannot compute with"
    if any(files.dtype(name) is None for name in files.names):
        return "is quantized: transformers dequantizes it in another way"
    if not any(name.startswith("model.") for name in files.names):
        return "is in the public release's layout, which transformers cannot read"
    if HEAD not in files.names and not config.tie_word_embeddings:
        return f"has no {HEAD}"
    return None


def _drawn(sample: SceneSample, seed: int) -> list[Question]:
    """One question of each kind."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions(sample.scene):
        by_kind.setdefault(question.kind, []).append(question)
    draws = np.random.default_rng((seed, sample.index))
    return [group[draws.integers(len(group))] for group in by_kind.values()]


def _load(folder: Path, dtype: torch.dtype) -> Any:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _use_weights(model: Any, backbone: FrozenBackbone) -> None:
    """Replace the base weights of `model` by the tensors of `backbone`, without a copy. An untied head stays."""
    parts = {"language_model": backbone.text, "visual": backbone.vision}
    weights = {
        # Detached: else the backbone's own parameters would get the model's `requires_grad`.
        f"model.{part}.{name}": weight.detach()
        for part, module in parts.items()
        for name, weight in module.named_parameters()
    }
    unmatched = model.load_state_dict(weights, strict=False, assign=True)
    assert set(unmatched.missing_keys) <= {HEAD} and not unmatched.unexpected_keys, unmatched
    model.tie_weights()


def _answers(
    model: Any, template: QuestionTemplate, asked: Sequence[_Asked], images: Tensor, part: slice
) -> list[tuple[bool, bytes]]:
    """For each question of a part: whether the greedy answer is the right one, and the hash of the right answer's
    logits.

    A greedy answer is right exactly if every token is the most likely one after the right ones before it.
    """
    found = []
    rows = [template.question(each.question.text) for each in asked[part]]
    answers = [template.answer(each.question.answer) for each in asked[part]]
    hidden = _hidden(model, [*map(list.__add__, rows, answers)], images[[each.image for each in asked[part]]])
    for row, before, answer in zip(hidden, rows, answers, strict=True):
        logits = model.lm_head(row[len(before) - 1 : len(before) - 1 + len(answer)])
        is_right = logits.argmax(-1).tolist() == answer
        found.append((is_right, hashlib.sha256(logits.cpu().view(torch.uint8).numpy().data).digest()))
    return found


def _hidden(model: Any, rows: list[list[int]], images: Tensor) -> Tensor:
    """Last hidden states [B, T, D] of token rows, padded at their ends, each with one of the images [B, 3, S, S]."""
    config, device = model.config, model.device
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    filled = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        filled[number, : len(row)] = 1
    vision = config.vision_config
    pixels = pixel_patches(images, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    grid = torch.tensor([[1, *[images.shape[-1] // vision.patch_size] * 2]]).expand(len(rows), 3)
    return model.model(
        input_ids=ids.to(device),
        attention_mask=filled.to(device),
        pixel_values=pixels.to(device, model.dtype),
        image_grid_thw=grid.to(device),
        mm_token_type_ids=(ids == config.image_token_id).int().to(device),
        use_cache=False,
    ).last_hidden_state


def _accuracy(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """By kind in alphabetical order, then of all."""
    return {
        kind: float(np.mean([is_right for each, is_right in zip(kinds, right, strict=True) if kind in (each, "all")]))
        for kind in (*sorted(set(kinds)), "all")
    }
