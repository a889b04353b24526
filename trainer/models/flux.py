"""The frozen FLUX: its folder and parts, the geometry of its latents, and flow matching.

Legend: B samples, S image side in pixels, c latent channels, h x w latents, M = h w / 4 packed tokens of C = 4 c
channels, L text tokens of width E, P pooled text width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.initialization import no_init_weights

from ...recipes.fields import HeldWeights
from ...recipes.stage2 import T5_TOKENS
from ..errors import RunError
from . import weights
from .eight_bit_source import frozen_source
from .eight_bits import scales
from .flux_config import PARTS, FluxConfig, Part, require_files
from .flux_transformer import FluxTransformer
from .latent_controlnet import Residuals
from .safetensors_files import other_format_hint
from .tokenizers import open_tokenizer

TABLE = 1000
"""Number of noise levels that training draws from."""


def pack(latents: Tensor) -> Tensor:
    """Latents [B, c, h, w] as FLUX tokens of 2 x 2 latents, [B, h w / 4, 4 c]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for latents of `height` x `width`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """FLUX's positions (0, row, column) of the packed tokens of h x w latents, [h w / 4, 3]."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.cartesian_prod(rows, columns)
    return F.pad(grid, (1, 0)).float()


def sigmas(normal: Tensor) -> Tensor:
    """Noise levels in [0.001, 1] from standard normal draws, both [B].

    Logit-normal index into a table of 1000 unshifted levels, as in diffusers' train_controlnet_flux.py.
    """
    index = (normal.double().sigmoid() * TABLE).long().clamp(max=TABLE - 1)
    return ((TABLE - index) / TABLE).float()


def noisy(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise, for sigma [B] and tensors [B, ...]."""
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that FLUX predicts, noise - latents."""
    return noise - latents


def velocity(
    transformer: FluxTransformer2DModel,
    noisy: Tensor,
    residuals: Residuals | None,
    text: Tensor,
    pooled: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Tensor:
    """FLUX's velocity [B, M, C], fp32, at noisy packed latents [B, M, C] and timestep [B] in [0, 1].

    text [B, L, E], pooled [B, P], img_ids [M, 3], txt_ids [L, 3]; guidance [B] if this FLUX takes one. Of n residuals,
    number i // ceil(blocks / n) is added after double block i; single blocks likewise.
    """
    dtype = transformer.x_embedder.weight.dtype
    return transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=text.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=timestep,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=txt_ids,
        controlnet_block_samples=residuals.double or None if residuals else None,
        controlnet_single_block_samples=residuals.single or None if residuals else None,
        return_dict=False,
    )[0].float()


class Tokens(NamedTuple):
    """Prompts for T5 [B, L] and CLIP [B, 77], padded to full length: FLUX attends to the padding too."""

    t5: Tensor
    clip: Tensor


class FluxTokenizers:
    """Prompts -> Tokens; runs in the loader workers."""

    def __init__(self, folder: FluxFolder) -> None:
        self.t5 = open_tokenizer(folder.path / "tokenizer_2", folder.t5.vocab_size)
        self.clip = open_tokenizer(folder.path / "tokenizer", folder.clip.vocab_size)
        self.t5_length, self.clip_length = folder.text_lengths

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        return Tokens(_ids(self.t5, prompts, self.t5_length), _ids(self.clip, prompts, self.clip_length))

    def count_truncated(self, prompts: Sequence[str], t5: Tensor) -> int:
        """How many of `prompts` have ends that T5 does not read, from their tokens t5 [B, L]. CLIP, whose one pooled
        vector adds to T5's states, reads 77 tokens of any."""
        rows = zip(prompts, t5[:, -1].tolist(), strict=True)
        full = (prompt for prompt, last in rows if last != self.t5.pad_token_id)
        return sum(len(self.t5(prompt, verbose=False).input_ids) > self.t5_length for prompt in full)

    def limits(self, prompt: str) -> dict[str, tuple[int, int]]:
        """Text encoder -> (tokens of the prompt, maximum it accepts)."""
        readers = {"T5": (self.t5, self.t5_length), "CLIP": (self.clip, self.clip_length)}
        return {name: (len(one(prompt, verbose=False).input_ids), limit) for name, (one, limit) in readers.items()}


def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), **settings).input_ids


class FluxFolder(FluxConfig):
    """A FLUX.1 model in diffusers' folder layout, with its weights and tokenizers."""

    @classmethod
    def open(
        cls, path: Path, held: HeldWeights = "bf16", text_tokens: int = T5_TOKENS, for_counting: bool = False
    ) -> FluxFolder:
        """Open and check a folder. RunError names what is missing or inconsistent. for_counting: configs suffice."""
        if not for_counting:
            needed = [f"{part}/config.json" for part in PARTS]
            needed += ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/*", "tokenizer_2/*"]
            for part in PARTS:
                if not any((path / part).glob("*.safetensors")) and (other := other_format_hint(path / part)):
                    raise RunError(f"{path / part}: no safetensors files there{other}")
            require_files(path, [*needed, *(f"{part}/*.safetensors" for part in PARTS)])
        folder = super().open(path, held, text_tokens)
        assert isinstance(folder, FluxFolder)
        if not for_counting:
            assert folder.tokenizers  # like weight files, checked here before anything is built
            for part in PARTS:
                weights.weight_files(path / part)
        return folder

    @cached_property
    def tokenizers(self) -> FluxTokenizers:
        return FluxTokenizers(self)

    def build(self, part: Part) -> Any:
        """Build one part without weights."""
        with no_init_weights():
            if part == "transformer":
                return FluxTransformer.build(self.transformer, self.held)
            if part == "vae":
                return AutoencoderKL.from_config(self.vae)
            if part == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(self.clip.as_stated()))
            t5 = T5EncoderModel(T5Config.from_dict(self.t5.as_stated()))
            t5.encoder.set_input_embeddings(t5.shared)
            return t5

    def files(self, part: Part) -> weights.WeightFiles:
        return weights.WeightFiles(self.path / part)

    def names(self, part: Part, module: nn.Module, files: weights.WeightFiles) -> dict[str, str]:
        """Parameter name of a built part -> name in `files`; none for scales of 8-bit weights."""
        skipped = scales(module)
        names = {name: name for name, _ in module.named_parameters() if name not in skipped}
        if part == "text_encoder":  # hub files of a CLIPTextModel have its former prefix, newer ones do not
            prefix = "text_model." if any(name.startswith("text_model.") for name in files.names) else ""
            names = {name: prefix + name.removeprefix("text_model.") for name in names}
        elif part == "text_encoder_2" and files.shape("shared.weight") is None:  # the embedding's other name
            names["shared.weight"] = "encoder.embed_tokens.weight"
        return names

    def require_weights(self) -> None:
        """RunError unless the files of every part contain its weights; reads no weights."""
        for part in PARTS:
            files = self.files(part)
            with torch.device("meta"):
                files.require(list(self.names(part, self.build(part), files).values()))

    def fill(self, part: Part, module: nn.Module) -> None:
        """Set a built part's weights from its files."""
        files, parameters = self.files(part), dict(module.named_parameters())
        names, source = frozen_source(module, self.names(part, module, files), files, self.held)
        weights.fill({names[name]: p for name, p in parameters.items()}, source, files.path)


class FrozenFlux(nn.Module):
    """Parts of a FLUX, frozen; omitted parts are None. `load` fills the weights after construction."""

    def __init__(self, folder: FluxFolder, parts: Collection[Part] = PARTS) -> None:
        super().__init__()
        self.folder = folder
        built: dict[Part, Any] = {part: folder.build(part) if part in parts else None for part in PARTS}
        self.transformer = built["transformer"]
        self.vae = built["vae"]
        self.text_encoder = built["text_encoder"]
        self.text_encoder_2 = built["text_encoder_2"]
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenFlux:
        """Stay in evaluation mode: T5 has dropout."""
        return super().train(False)

    def load(self) -> None:
        for part in PARTS:
            module = getattr(self, part)
            if module is not None:
                self.folder.fill(part, module)

    def guidance(self, scale: float, samples: int, device: torch.device | None = None) -> Tensor | None:
        """`scale` as [B], or None for a FLUX without guidance."""
        return torch.full((samples,), scale, device=device) if self.folder.guided else None

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, c, h, w], fp32, of uint8 images [B, 3, S, S]: (z - shift) scale.

        z is the posterior's sample for standard normal `noise` [B, c, h, w], or its mean without noise.
        """
        mean, std = self.posterior(images)
        return self.sample_posterior(mean, std, torch.zeros_like(std) if noise is None else noise)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, c, h, w] of the VAE's latents of uint8 images [B, 3, S, S]."""
        pixels = F.pixel_unshuffle(images.float() / 127.5 - 1, self.folder.depth)
        found: Any = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return found.mean, found.std

    def sample_posterior(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """FLUX latents, fp32, sampled from a posterior with standard normal `noise`; all [B, c, h, w]."""
        return (mean.float() + std.float() * noise - self._shift) * self._scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] of latents [B, c, h, w] scaled as by `encode_images`."""
        z = latents / self._scale + self._shift
        pixels = F.pixel_shuffle(self.vae.decode(z.to(self.vae.dtype)).sample.float(), self.folder.depth)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def encode_text(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, E] and CLIP pooled state [B, P]."""
        return self.text_encoder_2(tokens.t5).last_hidden_state, self.text_encoder(tokens.clip).pooler_output

    @property
    def _shift(self) -> float:
        return self.folder.vae.get("shift_factor") or 0.0

    @property
    def _scale(self) -> float:
        return self.folder.vae.get("scaling_factor", 0.18215)
