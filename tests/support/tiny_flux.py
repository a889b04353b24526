"""A FLUX with random weights in the layout of diffusers, small enough for tests that run it many times."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from bifrost.trainer.models.flux_config import SPACE_TO_DEPTH_KEY


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "<end>", "<unk>", "a", "red", "apple", "moon"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def pipeline(seed: int = 0) -> FluxPipeline:
    """The pipeline; its T5 has a dropout of 0.5 in training mode, and a latent is four pixels wide."""
    torch.manual_seed(seed)
    clip = CLIPTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    t5 = T5Config(
        vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.5, pad_token_id=0
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            in_channels=12,
            out_channels=12,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.7,
            shift_factor=0.2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer(9),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer(13),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=12,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def save(made: FluxPipeline, folder: Path) -> Path:
    """Save the pipeline, with the transformer in several files and a VAE on 2 x 2 space-to-depth pixels."""
    made.save_pretrained(folder, max_shard_size="40KB")
    change(folder / "vae" / "config.json", **{SPACE_TO_DEPTH_KEY: 2})
    return folder


def change(file: Path, **settings) -> None:
    """Set keys in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
