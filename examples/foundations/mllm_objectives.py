"""Objectives of the tiny Qwen2.5-VL: answer questions about an image, predict captions in stage 1's prompts, match
images with prompts, keep pixels.

Legend: B samples, T tokens, N patch latents of WIDTH channels, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from mllm_init import IMAGE_SIZE, SIDE, TOKENS, WIDTH, latents
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from bifrost.data.scenes.grammar import Scene, render
from bifrost.trainer.models.prompt import PromptTemplate

TEXT_WEIGHT, MATCH_WEIGHT, PIXEL_WEIGHT, SCALE_WEIGHT = 0.5, 0.3, 8.0, 0.1
IGNORED = -100
MATCH_WIDTH = 48
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
Dialogue = Sequence[tuple[str, str]]
"""Questions about an image, with answers."""
RIDGE = 1e-4  # of the latents' mean variance, added to every channel's


class Row(NamedTuple):
    """A padded batch of token rows [B, T]; targets are IGNORED except where the next token is to be predicted."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    """Rotary positions [3, B, T]."""
    last: Tensor
    """Index of each row's last token, [B]."""


class Prompts:
    """Tokenizes captions as the stage-1 prompt, and questions about an image with their answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.stage1 = PromptTemplate(tokenizer, max_tokens=64)
        self.tokenizer = tokenizer
        self.pad: int = tokenizer.pad_token_id
        self.end: int = tokenizer.eos_token_id
        image = "<|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|>"
        turns = [{"role": "user", "content": image + MARK}, {"role": "assistant", "content": MARK}]
        text = tokenizer.apply_chat_template([*turns, *turns], tokenize=False)
        start, self.turn_end, answer_end, _, _ = text.split(MARK)
        self.opening = self._ids(start)
        self.next_turn = answer_end.removeprefix(tokenizer.eos_token).removesuffix(image)
        self.image_at = self.opening.index(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        self.instruction = self._ids(self.stage1.head.rstrip(" "))  # the space belongs to the caption's first token

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def generate(self, captions: list[str]) -> Row:
        """Prompts of stage 1, which end in <|vision_start|>; the targets are the caption and the end of its turn."""
        rows = [self.stage1.ids(caption) for caption in captions]
        skipped, untaught = len(self.instruction), len(self.stage1.suffix) - 1
        targets = [[IGNORED] * skipped + row[skipped : len(row) - untaught] + [IGNORED] * untaught for row in rows]
        return self._pad(rows, targets)

    def answer(self, dialogues: list[Dialogue]) -> Row:
        """An image followed by questions with their answers, which are the targets; the image's ids are placeholders
        for its latents."""
        rows, targets = [], []
        for dialogue in dialogues:
            ids, asked = list(self.opening), [IGNORED] * len(self.opening)
            for number, (question, answer) in enumerate(dialogue):
                before = self._ids((self.next_turn if number else "") + question + self.turn_end)
                after = [*self._ids(answer), self.end]
                ids += before + after
                asked += [IGNORED] * len(before) + after
            rows.append(ids)
            targets.append(asked)
        row = self._pad(rows, targets)
        row.positions.copy_(self._image_positions(row.ids.shape[1])[:, None])
        return row

    def _pad(self, rows: list[list[int]], targets: list[list[int]]) -> Row:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        wanted = torch.full((len(rows), length), IGNORED)
        for row, (values, asked) in enumerate(zip(rows, targets, strict=True)):
            ids[row, : len(values)] = torch.tensor(values)
            wanted[row, : len(values) - 1] = torch.tensor(asked[1:])
        positions = torch.arange(length).expand(3, len(rows), -1).clone()
        return Row(ids, wanted, positions, torch.tensor([len(values) - 1 for values in rows]))

    def _image_positions(self, length: int) -> Tensor:
        """Qwen's positions [3, length]: text counts up, an image at n has (n, n + row, n + column)."""
        start, patch = self.image_at, torch.arange(TOKENS)
        image = start + torch.stack((torch.zeros_like(patch), patch // SIDE, patch % SIDE))
        after = start + SIDE + torch.arange(length - start - TOKENS)
        return torch.cat((torch.arange(start).expand(3, -1), image, after.expand(3, -1)), dim=1)


class Heads(nn.Module):
    """Heads used only in training: pixels from latents, and a joint embedding of images and texts."""

    def __init__(self) -> None:
        super().__init__()
        side = IMAGE_SIZE // SIDE
        self.pixels = nn.Linear(WIDTH, 3 * side * side)
        self.image = nn.Linear(WIDTH, MATCH_WIDTH, bias=False)
        self.text = nn.Linear(WIDTH, TOKENS * MATCH_WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))

    def fit_pixels(self, z: Tensor, images: Tensor) -> None:
        """Set `pixels` to the best linear map from latents z [n, N, WIDTH] to uint8 images [n, 3, S, S]."""
        weights = ridge(z, pixel_targets(images))
        with torch.no_grad():
            self.pixels.weight.copy_(weights[:-1].T)
            self.pixels.bias.copy_(weights[-1])

    def match(self, z: Tensor, states: Tensor) -> Tensor:
        """Similarity [B, B] of images with latents z [B, N, WIDTH] and prompts with states [B, WIDTH]: patch by patch,
        so that images with the same objects at other places differ."""
        image = F.normalize(self.image(z).flatten(1).float(), dim=-1)
        text = F.normalize(self.text(states).float(), dim=-1)
        return self.log_scale.exp().clamp(max=100) * image @ text.T


def to_images(scenes: Sequence[Scene]) -> Tensor:
    """The scenes, uint8 [n, 3, S, S]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def pixel_targets(images: Tensor) -> Tensor:
    """Pixels -1 .. 1 of each patch latent, [B, N, 3 * side^2], of uint8 images [B, 3, S, S]."""
    side = IMAGE_SIZE // SIDE
    tiles = images.float().div(127.5).sub(1).view(len(images), 3, SIDE, side, SIDE, side)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(len(images), TOKENS, -1)


def with_one(z: Tensor) -> Tensor:
    """Latents z [n, N, WIDTH] as rows [n * N, WIDTH + 1], with a last column of ones."""
    return F.pad(z.flatten(0, 1), (0, 1), value=1.0)


def ridge(z: Tensor, pixels: Tensor) -> Tensor:
    """Weights [WIDTH + 1, C] of the ridge regression of pixels [n, N, C] on latents z [n, N, WIDTH]."""
    rows = with_one(z)
    penalty = torch.full((WIDTH + 1,), RIDGE * len(rows) * z.var().item())
    penalty[-1] = 0.0
    return torch.linalg.solve(rows.T @ rows + penalty.diag(), rows.T @ pixels.flatten(0, 1))


def hidden_states(model: Qwen2_5_VLForConditionalGeneration, row: Row, z: Tensor | None, at: int = 0) -> Tensor:
    """Final hidden states [B, T, WIDTH]; latents z replace the token embeddings from position `at`."""
    embedded = model.get_input_embeddings()(row.ids)
    if z is not None:
        embedded = torch.cat((embedded[:, :at], z.to(embedded.dtype), embedded[:, at + TOKENS :]), dim=1)
    text = model.model.language_model
    return text(inputs_embeds=embedded, position_ids=row.positions, use_cache=False).last_hidden_state


def token_losses(model: Qwen2_5_VLForConditionalGeneration, states: Tensor, row: Row) -> Tensor:
    """Cross-entropy per target token in nats, [tokens]."""
    taught = row.targets != IGNORED
    return F.cross_entropy(model.lm_head(states[taught]).float(), row.targets[taught], reduction="none")


class Losses(NamedTuple):
    answer: Tensor
    text: Tensor
    match: Tensor
    pixels: Tensor
    scale: Tensor

    def total(self) -> Tensor:
        return (
            self.answer
            + TEXT_WEIGHT * self.text
            + MATCH_WEIGHT * self.match
            + PIXEL_WEIGHT * self.pixels
            + SCALE_WEIGHT * self.scale
        )


def losses(
    model: Qwen2_5_VLForConditionalGeneration,
    heads: Heads,
    prompts: Prompts,
    images: Tensor,
    captions: list[str],
    dialogues: list[Dialogue],
) -> Losses:
    """Losses of one batch of uint8 images [B, 3, S, S], their captions, and questions with answers."""
    z = latents(model, images)
    answer, prompt = prompts.answer(dialogues), prompts.generate(captions)
    answered = hidden_states(model, answer, z, prompts.image_at)
    read = hidden_states(model, prompt, None)
    similar = heads.match(z, read[torch.arange(len(captions)), prompt.last])
    own = torch.arange(len(captions))
    return Losses(
        token_losses(model, answered, answer).mean(),
        token_losses(model, read, prompt).mean(),
        (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2,
        F.mse_loss(heads.pixels(z).float(), pixel_targets(images)),
        (z.float().square().mean() - 1).square(),  # keeps the latents at a standard deviation of about 1
    )
