"""Stage 1: predict the latents of masked patches from a caption and the patches left visible.

Legend: B samples of a micro-batch, N patches, T text tokens, S image side in pixels, D latent width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...data import Item
from ...kernels import PatchLatentHead, PrefixLayout
from ...recipes import Recipe
from ..errors import RunError
from ..kernel_choice import KernelChoice
from ..models import weights
from ..models.backbone import FrozenBackbone, Prefix
from ..models.branch import INIT_STD, GenerationBranch
from ..models.elementwise import use_liger
from ..models.masking import draw_masks, masked_counts
from ..models.prompt import PromptTemplate
from ..randomness import IntArray, Stream, uniform


class Losses(NamedTuple):
    """Of one micro-batch: `loss` [] to differentiate, and `sums` [3], detached, for `report`.

    A tuple, because ZeRO-3's hooks find tensors in nothing else.
    """

    loss: Tensor
    sums: Tensor


SUMS = 3
"""Entries of `Losses.sums`: squared error of the masked patches, their number, tokens of text and image."""


def report(sums: list[float]) -> dict[str, float]:
    """Metrics from the sums over a step's micro-batches and ranks."""
    squares, masked, _ = sums
    return {"loss_masked": squares / masked if masked else 0.0}


def tokens(sums: list[float]) -> float:
    """Text tokens and patches that a step went through."""
    return sums[2]


def grid_side(config: Any, image_size: int) -> int:
    """Patches along one side of a square image, after the tower's merger."""
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    if image_size % unit:
        below = image_size // unit * unit
        raise RunError(
            f"data.image_size {image_size} is not a multiple of {unit} (patch x merge): set {below or unit}"
            f" or {below + unit}"
        )
    return image_size // unit


class PatchLatentModel(nn.Module):
    """Frozen backbone, generation branch and head. `load` fills the weights after construction."""

    def __init__(self, config: Any, recipe: Recipe, kernels: KernelChoice = KernelChoice()) -> None:
        super().__init__()
        side = grid_side(config, recipe.data.image_size)
        self.masked_only = recipe.branch.loss_tokens == "masked"
        self.backbone = FrozenBackbone(config, kernels.attention)
        self.branch = GenerationBranch(
            config.text_config,
            side,
            recipe.branch.positions,
            recipe.activation_checkpointing,
            kernels.attention,
            fused=kernels.head != "reference",
        )
        self.head = PatchLatentHead(config.text_config.hidden_size, kernels.head)
        if kernels.elementwise == "liger":
            use_liger(self)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load(self, files: weights.WeightFiles, seed: int) -> None:
        """Fill the backbone from `files`, make the branch's layers and norm its text model's copies, draw the rest."""
        for part in ("text", "vision"):
            module = getattr(self.backbone, part)
            parameters = dict(module.named_parameters())
            names = weights.backbone_names(part, parameters, files)
            weights.fill({names[name]: p for name, p in parameters.items()}, files, files.path)
        weights.copy_slices(self.branch.layers, self.backbone.text.layers)
        weights.copy_slices(self.branch.norm, self.backbone.text.norm)
        fresh = {n: p for n, p in self.trainable().items() if not n.startswith(("branch.layers", "branch.norm"))}
        weights.fill(fresh, weights.Drawn(seed, {n: _initial(n, p) for n, p in fresh.items()}), "initial weights")

    def restore_rotary(self) -> None:
        """Rotary tables in fp32, whatever the dtype the model was built in."""
        self.backbone.restore_rotary()
        self.branch.restore_rotary()

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        text_lengths: tuple[int, ...],
        mask: Tensor,
        masked: Tensor,
        normalizer: float,
    ) -> Losses:
        """Losses of images [B, 3, S, S] uint8 with packed prompts [sum T], hidden where mask [B, N] is True.

        masked: int64 [R], the rows of `mask` that are True among its B N, known without asking the device.
        normalizer: tokens that the mean goes over; see `token_normalizer`.
        """
        latents = self.backbone.patch_latents(images)
        layout = PrefixLayout.of(text_lengths, mask.shape[1], mask.device)
        prefix = self.backbone.prefix(input_ids, layout)
        return self.losses(latents, mask, masked, prefix, normalizer)

    def losses(self, latents: Tensor, mask: Tensor, masked: Tensor, prefix: Prefix, normalizer: float) -> Losses:
        """Losses of predicted against given latents [B, N, D]. With `loss_tokens: masked` no other row is projected."""
        target = latents.flatten(0, 1)
        if self.masked_only:
            loss, squares = self.head(self.branch(latents, mask, prefix, masked), target[masked], None, normalizer)
            error = squares.sum()
        else:
            loss, squares = self.head(self.branch(latents, mask, prefix).flatten(0, 1), target, None, normalizer)
            error = squares[masked].sum()
        tokens = float(mask.numel() + prefix.layout.text.total)
        return Losses(loss, torch.stack((error, error.new_tensor(float(len(masked))), error.new_tensor(tokens))))


def _initial(name: str, parameter: nn.Parameter) -> weights.Distribution:
    """Mask token and table as in MAR; the head as a torch Linear starts."""
    shape = weights.full_shape(parameter)
    if name.startswith("head."):
        return weights.Distribution(shape, "uniform", shape[-1] ** -0.5)
    return weights.Distribution(shape, "normal", INIT_STD)


class PatchLatentCollate:
    """Items of a micro-batch -> arguments of the model, in the loader's workers.

    Every draw depends on (seed, epoch, index) alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, tokens: int) -> None:
        self.template = PromptTemplate(tokenizer, recipe.branch.max_text_tokens)
        self.recipe = recipe
        self.tokens = tokens

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        seed = self.recipe.seed
        epoch = np.array([item.epoch for item in items], dtype=np.int64)
        index = np.array([item.index for item in items], dtype=np.int64)
        dropped = uniform(seed, Stream.CAPTION_DROPOUT, epoch, index, 1)[:, 0] < self.recipe.branch.caption_dropout
        captions = ["" if drop else item.caption for drop, item in zip(dropped, items, strict=True)]
        input_ids, text_lengths = self.template.batch(captions)
        mask = draw_masks(seed, epoch, index, hidden_counts(self.recipe, epoch, index, self.tokens), self.tokens)
        images = np.stack([item.image for item in items]).transpose(0, 3, 1, 2)
        return {
            "images": torch.from_numpy(np.ascontiguousarray(images)),
            "input_ids": input_ids,
            "text_lengths": text_lengths,
            "mask": torch.from_numpy(mask),
            "masked": torch.from_numpy(np.flatnonzero(mask)),
        }


def hidden_counts(recipe: Recipe, epoch: IntArray, index: IntArray, tokens: int) -> IntArray:
    """Hidden patches of each sample [B] under the recipe's mask rate."""
    return masked_counts(recipe.seed, epoch, index, tokens, **recipe.branch.mask_rate.model_dump())


def token_normalizer(recipe: Recipe, epoch: IntArray, index: IntArray, tokens: int, passes: int) -> float:
    """Tokens a backward pass must divide by, for the mean over the whole global batch.

    epoch, index: [G] of the step's samples on all ranks; they are a function of the plan, so every rank knows the
    count without asking. passes: ranks x accumulation, which the engine averages gradients over.
    """
    if recipe.branch.loss_tokens == "all":
        return len(index) * tokens / passes
    return float(hidden_counts(recipe, epoch, index, tokens).sum()) / passes
