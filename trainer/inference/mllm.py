"""The model of a stage-1 run, and the patch latents that it decodes from prompts.

Legend: B prompts, N patches, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import PrefixLayout
from ...kernels.attention import unavailable
from ..checkpoint.state import restore_statistics
from ..models.kernel_selection import KernelChoice
from ..models.prompt import PromptTemplate
from ..models.weights import fill
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from ..stages.unsharded import init_context
from .masked_decoding import Schedule, decode, draw_latent_noise, draw_orders
from .stored_runs import checkpoint_weights, has_checkpoints


def load_mllm(
    path: Path, stage: PatchLatentStage, device: torch.device, dtype: torch.dtype, vision: bool = True
) -> PatchLatentModel:
    """The model of a stage-1 run, of one of its checkpoints, or of an export in either layout. vision: with its vision
    encoder."""
    fast = unavailable("varlen", device, dtype) is None
    over = "varlen" if fast else "sdpa"
    stage.kernels = KernelChoice(attention=over, vision=over)
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
    steps: int = 16,
    schedule: Schedule = "cosine",
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Patch latents [B, N, D] decoded from the prompts, as one batch; a seed per prompt determines the order of its
    patches, and a flow head's noise. See `decode` and `draw_latent_noise`."""
    # Caption dropout trains with the empty caption: that is the unconditional prompt.
    rows = [*prompts, *([""] * len(prompts) if guidance != 1 else [])]
    input_ids, lengths = template.batch(rows)
    patches, device = model.branch.side**2, model.branch.mask_token.device
    prefix = model.backbone.prefix(input_ids.to(device), PrefixLayout.of(lengths, patches, device))
    orders = draw_orders(seeds, patches).to(device)
    noise = draw_latent_noise(model.head, seeds, patches, temperature)
    return decode(model.branch, model.head, prefix, orders, steps, schedule, guidance, noise)
