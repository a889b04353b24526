"""The model of a stage-1 run, and the patch latents that it decodes from prompts.

Legend: B prompts, N patches, D latent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import PrefixLayout
from ...kernels.attention import unavailable
from ..checkpoint.state import restore_statistics
from ..models.backbone import Prefix
from ..models.image_grids import Grid
from ..models.kernel_selection import KernelChoice
from ..models.prompt import PromptTemplate
from ..models.source_tokens import SourceTokens
from ..models.weights import fill
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from ..stages.unsharded import init_context
from .masked_decoding import decode, draw_latent_noise, draw_orders, reveal_counts
from .settings import Settings
from .stored_runs import checkpoint_weights, has_checkpoints


def load_mllm(
    path: Path, stage: PatchLatentStage, device: torch.device, dtype: torch.dtype, vision: bool = True
) -> PatchLatentModel:
    """The model of a stage-1 run, of one of its checkpoints, or of an export in either layout. vision: with its vision
    encoder."""
    fast = unavailable("varlen", device, dtype) is None
    over = "varlen" if fast else "sdpa"
    stage.kernels = KernelChoice(attention=over, vision=over)
    stage.texts = False  # no tokens are predicted here
    with init_context(device, dtype):
        model = stage.build(vision=vision)
    stage.load(model)
    model.to(device).eval()  # includes the rotary tables rebuilt by `load`
    if has_checkpoints(path):
        trained = checkpoint_weights(path)
        fill(model.trainable(), trained, path)
        restore_statistics(model.statistics(), trained.reader, trained.slot)
    else:
        source, names = stage.from_public_checkpoint(path)
        tensors: dict[str, Any] = {**model.trainable(), **model.statistics()}
        fill({names[name]: tensor for name, tensor in tensors.items()}, source, path)
    return model


@torch.no_grad()
def decode_prompts(
    model: PatchLatentModel,
    template: PromptTemplate,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings = Settings(),
    grid: Grid | None = None,
    sources: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Patch latents [B, N, D] decoded from the prompts, as one batch; a seed per prompt determines the order of its
    patches, and a flow head's noise. See `decode` and `draw_latent_noise`.

    grid: rows and columns of the N patches; None: the square. sources: a source image uint8 [3, H, W], all of one size,
    for each prompt that is an instruction; None: for none.
    """
    # Caption dropout trains with the empty caption, next to the source image: that is the unconditional prompt.
    copies = 1 if settings.guidance == 1 else 2
    rows = [*prompts, *([""] * len(prompts) * (copies - 1))]
    grid, device = grid or (model.branch.side, model.branch.side), model.branch.mask_token.device
    patches = math.prod(grid)
    prefix = prompt_prefix(model, template, rows, [*(sources or [None] * len(prompts))] * copies, patches)
    orders = draw_orders(seeds, patches).to(device)
    noise = draw_latent_noise(model.head, seeds, patches, settings.temperature)
    counts = reveal_counts(patches, settings.steps, settings.schedule)
    return decode(model.branch, model.head, prefix, orders, counts, settings.guidance, noise, grid)


def prompt_prefix(
    model: PatchLatentModel,
    template: PromptTemplate,
    rows: Sequence[str],
    sources: Sequence[Tensor | None],
    patches: int,
) -> Prefix:
    """Keys and values of the prompts `rows`, in front of `patches` latents each. sources: see `decode_prompts`."""
    device = model.branch.mask_token.device
    shown, tokens, count = [each for each in sources if each is not None], None, 0
    if shown:
        images = torch.stack(shown).to(device)
        grid = model.backbone.grid(images)
        count = grid[0] * grid[1]
    input_ids, lengths = template.batch(rows, [0 if each is None else count for each in sources])
    if shown:
        begins = [None if each is None else template.source_begin for each in sources]
        tokens = SourceTokens.of(model.backbone.patch_latents(images), lengths, begins, grid)
    return model.backbone.prefix(input_ids.to(device), PrefixLayout.of(lengths, patches, device), tokens)
