"""Initialization of the tiny Qwen2.5-VL: its architecture, and a vision encoder that starts as a PCA of the pixels.

An encoder with random weights keeps about 17 dB of the image, and a short training would be spent mostly on recovering
it. Here the patch embedding and the merger are initialized to projections on principal components, the blocks between
them to identity, so that the latents contain the image at step 0 and training improves their semantics.

Legend: B images, 3 channels, S pixels per side, P patches before the merger, N after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bifrost.trainer.models.backbone import VISION_ATTENTION, pixel_patches

IMAGE_SIZE = 112
WIDTH = 192
VISION_WIDTH = 128
PATCH, MERGE, TEMPORAL = 14, 2, 2
SIDE = IMAGE_SIZE // PATCH // MERGE
TOKENS = SIDE * SIDE
EMBEDDING_STD = 0.1
STEADY = 32.0
"""Value of the constant channel, about three times the norm of all others together. It makes RMSNorm, which would
otherwise remove every patch's contrast, nearly a fixed scale. The patch embedding has no bias; the first block has."""


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """2.9 million parameters; every token id is in the tokenizer's vocabulary."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {
        "depth": 3,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "window_size": 56,
        "fullatt_block_indexes": [2],
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build(tokenizer: PreTrainedTokenizerBase, images: Tensor) -> Qwen2_5_VLForConditionalGeneration:
    """The initial model, its encoder fitted to uint8 images [B, 3, S, S]. Draws from torch's global generator."""
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=EMBEDDING_STD if "embed_tokens" in name else fan_in**-0.5)
    model.model.visual.config._attn_implementation = VISION_ATTENTION
    with torch.no_grad():
        _principal_tower(model, images)
    return model


def latents(model: Qwen2_5_VLForConditionalGeneration, images: Tensor) -> Tensor:
    """Patch latents [B, N, WIDTH] of uint8 images [B, 3, S, S], with gradients."""
    patches = pixel_patches(images, PATCH, TEMPORAL, MERGE)
    grid = torch.tensor([[1, SIDE * MERGE, SIDE * MERGE]]).expand(len(images), 3)
    return model.model.visual(patches, grid_thw=grid).pooler_output.view(len(images), TOKENS, WIDTH)


@torch.no_grad()
def every_latent(model: Qwen2_5_VLForConditionalGeneration, images: Tensor) -> Tensor:
    """As `latents`, without gradients and in batches, for any number of images."""
    return torch.cat([latents(model, part) for part in images.split(64)])


def _principal_tower(model: Qwen2_5_VLForConditionalGeneration, images: Tensor) -> None:
    visual = model.model.visual
    for block in visual.blocks:
        for module in (block.attn.proj, block.mlp.down_proj):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    visual.blocks[0].attn.proj.bias[-1] = STEADY

    patches = pixel_patches(images, PATCH, TEMPORAL, MERGE)  # [B * P, 3 * TEMPORAL * PATCH^2]
    _, components, spread = _principal(patches, VISION_WIDTH - 1)
    # Partially whitened, so that brightness does not dominate and small components are not pure noise.
    rows = components / spread.sqrt()[:, None]
    rows = rows / (patches @ rows.T).square().mean().sqrt()
    embedding = visual.patch_embed.proj.weight
    embedding.zero_()
    embedding[:-1] = rows.view(VISION_WIDTH - 1, *embedding.shape[1:])

    merger = visual.merger
    first, last = merger.mlp[0], merger.mlp[2]
    grid = torch.tensor([[1, SIDE * MERGE, SIDE * MERGE]]).expand(len(images), 3)
    blocks = visual(patches, grid_thw=grid).last_hidden_state
    merged = merger.ln_q(blocks).reshape(-1, first.in_features)  # [B * N, 4 * VISION_WIDTH], in the windows' order
    mean, components, _ = _principal(merged, WIDTH)
    rows = components / ((merged - mean) @ components.T).square().mean().sqrt()
    # GELU(a) - GELU(-a) = a: half of the hidden units mirror the others, so that the merger is initially linear. A
    # rotation spreads the components evenly over the channels.
    half = first.out_features // 2
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    for module in (first, last):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    first.weight[:WIDTH], first.bias[:WIDTH] = rows, -(rows @ mean)
    first.weight[half : half + WIDTH], first.bias[half : half + WIDTH] = -rows, rows @ mean
    last.weight[:, :WIDTH] = rotation
    last.weight[:, half : half + WIDTH] = -rotation


def _principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], first `count` principal components [count, D] and their standard deviations, of rows [R, D]."""
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean, vectors.T.flip(0)[:count], values.flip(0)[:count].clamp_min(1e-12).sqrt()
