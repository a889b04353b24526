"""The tiny FLUX's text encoders: CLIP for the pooled state, T5 for the token states, pretrained before FLUX.

They learn what the named objects look like, and nothing of where they are. T5's tokenizer prepends REGISTERS tokens to
every caption, four for each of up to four objects in the order of their mention; each predicts the latents of a quarter
of its object. CLIP's pooled state predicts the sum of the objects' principal components. FLUX then has to arrange and
render the objects. Both encoders are frozen afterwards.

Legend: B captions, T = MAX_TOKENS tokens, L looks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flux_data import JOINTS, listed, sprite_cells
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from bifrost.data.scenes.drawings import Look
from bifrost.data.scenes.grammar import Scene

VOCABULARY = 1536
T5_WIDTH, CLIP_WIDTH = 192, 128
OBJECTS, QUARTERS = 4, 4
REGISTERS = [f"<object_{number}_{quarter}>" for number in range(OBJECTS) for quarter in range(QUARTERS)]
MAX_TOKENS, CLIP_TOKENS = 48, 32
COMPONENTS = 64
CALL_KEYS = (
    *("is_local", "local_files_only", "max_length", "pad_to_multiple_of", "pad_token_type_id"),
    *("padding_side", "stride", "truncation_side", "truncation_strategy"),
)
BATCH, LEARNING_RATE, WARMUP_STEPS, POOLED_WEIGHT = 48, 2e-3, 50, 0.1


class Encoders(NamedTuple):
    """The text encoders and tokenizers of a FLUX folder."""

    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: PreTrainedTokenizerFast
    t5_tokenizer: PreTrainedTokenizerFast

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """CLIP's pooled states [B, CLIP_WIDTH]."""
        ids = self.clip_tokenizer(
            list(texts), padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return self.clip(ids).pooler_output

    def states(self, texts: Sequence[str]) -> Tensor:
        """T5's token states [B, T, T5_WIDTH]; padding is attended to, as in FLUX's pipeline."""
        ids = self.t5_tokenizer(
            list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return self.t5(ids).last_hidden_state

    def forget_calls(self) -> None:
        """Remove settings from the tokenizers that earlier calls and loading added and that would be saved."""
        for tokenizer in (self.clip_tokenizer, self.t5_tokenizer):
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
            for key in CALL_KEYS:
                tokenizer.init_kwargs.pop(key, None)

    def save(self, folder: Path) -> None:
        self.forget_calls()
        self.clip.save_pretrained(folder / "text_encoder")
        self.t5.save_pretrained(folder / "text_encoder_2")
        self.clip_tokenizer.save_pretrained(folder / "tokenizer")
        self.t5_tokenizer.save_pretrained(folder / "tokenizer_2")

    @classmethod
    def load(cls, folder: Path) -> Encoders:
        """Load the encoders of a FLUX folder, in fp32."""
        return cls(
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval(),
            PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        )


def _tokenizer(
    captions: Sequence[str], special: list[str], template: str, roles: dict[str, str], longest: int
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*captions, *JOINTS * 100]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **roles)


def build_encoders(captions: Sequence[str]) -> Encoders:
    """Tokenizers trained on the captions, and encoders with random weights from torch's global generator."""
    clip_tokenizer = _tokenizer(
        captions,
        ["<|startoftext|>", "<|endoftext|>"],
        "<|startoftext|> $A <|endoftext|>",
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        CLIP_TOKENS,
    )
    t5_tokenizer = _tokenizer(
        captions,
        ["<pad>", "</s>", *REGISTERS],
        " ".join([*REGISTERS, "$A", "</s>"]),
        {"eos_token": "</s>", "pad_token": "<pad>"},
        MAX_TOKENS,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=T5_WIDTH,
            d_kv=48,
            d_ff=512,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=64,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
            decoder_start_token_id=t5_tokenizer.pad_token_id,
        )
    )
    return Encoders(clip, t5, clip_tokenizer, t5_tokenizer)


class ObjectHeads(nn.Module):
    """Heads used only in training, which predict the objects from the text states."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.quarter = nn.Linear(T5_WIDTH, channels)
        self.pooled = nn.Linear(CLIP_WIDTH, COMPONENTS)

    def quarters(self, states: Tensor) -> Tensor:
        """The objects' latents [B, OBJECTS, QUARTERS, channels] predicted from T5's states."""
        return self.quarter(states[:, : len(REGISTERS)]).unflatten(1, (OBJECTS, QUARTERS))


class Sprites(NamedTuple):
    """What the encoders predict of every look, and in the last row of no object."""

    number: dict[Look, int]
    quarters: Tensor
    """[L + 1, QUARTERS, channels]."""
    components: Tensor
    """Principal components with a mean square of 1, [L + 1, COMPONENTS]."""

    def named(self, scene: Scene) -> list[int]:
        """Rows of the scene's looks in the order of the caption, filled up to OBJECTS with the row of no object."""
        rows = [self.number[look] for look in dict.fromkeys(each.look for each in scene.objects)]
        return rows + [len(self.number)] * (OBJECTS - len(rows))


def make_sprites(scenes: list[Scene], tokens: Tensor, blank: Tensor) -> Sprites:
    """From packed latents [L, 64, 64] of `sprite_scenes` and [1, 64, 64] of a white image."""
    quarters = sprite_cells(torch.cat((tokens, blank)))
    rows = (quarters - quarters[-1]).flatten(1)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    components = left[:, :COMPONENTS] * values[:COMPONENTS]
    number = {scene.objects[0].look: row for row, scene in enumerate(scenes)}
    return Sprites(number, quarters, components / components.square().mean().sqrt())


def train_encoders(encoders: Encoders, sprites: Sprites, scenes: list[Scene], steps: int, seed: int) -> ObjectHeads:
    """Train in place for `steps` steps on the scenes' captions, half of them replaced with FLUX's own."""
    draws = np.random.default_rng(seed)
    heads = ObjectHeads(sprites.quarters.shape[-1])
    named = [*encoders.clip.named_parameters(), *encoders.t5.named_parameters()]
    matrices = [
        p for name, p in named if p.ndim == 2 and (".layers." in name or "block." in name) and "bias" not in name
    ]
    chosen = set(map(id, matrices))
    rest = [p for _, p in named if id(p) not in chosen] + list(heads.parameters())
    rules = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    started = time.monotonic()
    for step in range(steps):
        part = [scenes[i] for i in draws.integers(len(scenes), size=BATCH)]
        texts = [scene.caption for scene in part]
        for row in range(0, BATCH, 2):
            texts[row], part[row] = listed(part[row], draws)
        rows = torch.tensor([sprites.named(scene) for scene in part])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted, components = heads.quarters(encoders.states(texts)), heads.pooled(encoders.pooled(texts))
        quarter_loss = F.mse_loss(predicted.float(), sprites.quarters[rows])
        pooled_loss = F.mse_loss(components.float(), sprites.components[rows].sum(dim=1))
        (quarter_loss + POOLED_WEIGHT * pooled_loss).backward()
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        late = max(0.0, 2 * step / steps - 1)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.97 * late)
            rule.step()
            rule.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"text {step + 1:5d}  objects {quarter_loss.item():.4f}  pooled {pooled_loss.item():.3f}"
                f"  {(time.monotonic() - started) / (step + 1):.3f} s/step",
                flush=True,
            )
    return heads
