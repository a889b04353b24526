"""The tiny FLUX's text encoders: CLIP for the pooled state, T5 for the token states, pretrained before FLUX.

There are few captions, each with one drawing, so the encoders learn to predict it: each of T5's first CELLS^2 tokens,
which its tokenizer prepends to every caption, regresses one cell of the latents, and CLIP's pooled state the drawing's
principal components. FLUX then only has to render its text states. Both encoders are frozen afterwards.

Legend: B captions, T = MAX_TOKENS tokens, C = CELLS^2 cells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from flux_data import CELLS, PREFIXES, SUFFIXES, cells, phrased
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

VOCABULARY = 1536
T5_WIDTH, CLIP_WIDTH = 192, 128
REGISTERS = [f"<cell_{number}>" for number in range(CELLS * CELLS)]
MAX_TOKENS, CLIP_TOKENS = 32, 24
COMPONENTS = 128
CALL_KEYS = (
    *("is_local", "local_files_only", "max_length", "pad_to_multiple_of", "pad_token_type_id"),
    *("padding_side", "stride", "truncation_side", "truncation_strategy"),
)
BATCH, LEARNING_RATE, WARMUP_STEPS = 64, 2e-3, 50
MATCH_WEIGHT, POOLED_WEIGHT = 0.05, 0.5


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
    texts = [*captions, *(f"{word} {caption}" for caption in captions for word in (PREFIXES[0], SUFFIXES[0]))]
    texts += [*PREFIXES, *SUFFIXES] * 100
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


class DrawingHeads(nn.Module):
    """Heads used only in training, which predict the drawing from the text states."""

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        count, channels = targets.shape[1:]
        self.cell = nn.Linear(T5_WIDTH, channels)
        self.place = nn.Parameter(targets.mean(dim=0))
        self.pooled = nn.Linear(CLIP_WIDTH, COMPONENTS)
        self.image = nn.Linear(COMPONENTS, CLIP_WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        nn.init.zeros_(self.cell.bias)
        self.count = count

    def cells(self, states: Tensor) -> Tensor:
        """The latents [B, C, 256] predicted from T5's states."""
        return self.cell(states[:, : self.count]) + self.place


def principal(tokens: Tensor) -> Tensor:
    """Packed latents [n, 64, 64] -> their first COMPONENTS principal components, scaled to a mean square of 1."""
    rows = tokens.flatten(1)
    rows = rows - rows.mean(dim=0)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    scores = left[:, :COMPONENTS] * values[:COMPONENTS]
    return scores / scores.square().mean().sqrt()


def train_encoders(encoders: Encoders, tokens: Tensor, captions: list[str], steps: int, seed: int) -> DrawingHeads:
    """Train in place for `steps` steps on packed latents [n, 64, 64] and their captions."""
    draws = torch.Generator().manual_seed(seed)
    targets, scores = cells(tokens), principal(tokens)
    heads = DrawingHeads(targets)
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
    order = torch.randperm(len(captions), generator=draws)
    started = time.monotonic()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(captions), generator=draws)
        index, order = order[:BATCH], order[BATCH:]
        texts = phrased([captions[i] for i in index.tolist()], draws)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted, pooled = heads.cells(encoders.states(texts)), encoders.pooled(texts)
            components = heads.pooled(pooled)
            similar = F.normalize(pooled.float(), dim=-1) @ F.normalize(heads.image(scores[index]).float(), dim=-1).T
        similar = heads.log_scale.exp().clamp(max=100) * similar
        own = torch.arange(BATCH)
        cell_loss = F.mse_loss(predicted.float(), targets[index])
        pooled_loss = F.mse_loss(components.float(), scores[index])
        match_loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        (cell_loss + POOLED_WEIGHT * pooled_loss + MATCH_WEIGHT * match_loss).backward()
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        late = max(0.0, 2 * step / steps - 1)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.97 * late)
            rule.step()
            rule.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"text {step + 1:5d}  cells {cell_loss.item():.4f}  pooled {pooled_loss.item():.3f}"
                f"  match {match_loss.item():.3f}  {(time.monotonic() - started) / (step + 1):.3f} s/step",
                flush=True,
            )
    return heads
