"""Outputs of FLUX's VAE and text encoders for a cache."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ...data import RawSample
from ..distributed.process_group import Gather, single_process
from ..models.flux import PARTS, FluxFolder, Part, Tokens
from ..models.flux_config import SPACE_TO_DEPTH_KEY
from .encoder_images import EncoderImages
from .latent_cache import VERSION, Kind
from .placement import PlacedFlux
from .unsharded import init_context

NEEDED: dict[Kind, tuple[Part, ...]] = {"vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}


class FluxOutputs:
    """`FrozenOutputs` of the VAE (mean and standard deviation of the posterior) or of the text encoders."""

    def __init__(self, kind: Kind, folder: FluxFolder, images: EncoderImages, precision: str) -> None:
        """images: of the VAE."""
        self.kind: Kind = kind
        self.setting = f"flux.placement.{kind}=cached"
        self.empty = kind == "text"
        self.folder = folder
        self.images = images
        self.missing = images.missing if kind == "vae" else "unreadable"
        self.precision = precision
        self._loaded: PlacedFlux | None = None

    def fingerprint(self, rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> dict[str, Any]:
        folder = self.folder
        made: dict[str, Any] = {"version": VERSION, "kind": self.kind, "precision": self.precision}
        for part in NEEDED[self.kind]:
            files = folder.files(part)
            with torch.device("meta"):
                names = list(folder.names(part, folder.build(part), files).values())
            files.require(names)
            made[f"{part} weights"] = files.content_hash(names, rank, ranks, gather)
        if self.kind == "vae":
            about = ("_class_name", "_diffusers_version", "_name_or_path", "scaling_factor", "shift_factor")
            made["vae config"] = {name: value for name, value in folder.vae.items() if name not in about}
            made["vae config"][SPACE_TO_DEPTH_KEY] = folder.depth
            made["flux.image_size"] = self.images.size
            made |= self.images.fingerprint
        else:
            tokenizers = folder.tokenizers
            made["tokens"] = [tokenizers.t5_length, tokenizers.clip_length]
            for name in ("tokenizer", "tokenizer_2"):
                files = sorted(file for file in (folder.path / name).iterdir() if file.is_file())
                content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
                made[name] = hashlib.sha256(" ".join(content).encode()).hexdigest()
        return made

    @property
    def sample_bytes(self) -> int:
        if self.kind == "vae":
            tokens = max(self.folder.grid(height) * self.folder.grid(width) for height, width in self.images.shapes)
            values = 2 * self.folder.vae["latent_channels"] * 4 * tokens
        else:
            values = self.folder.text_lengths[0] * self.folder.t5.d_model + self.folder.clip.hidden_size
        return (4 if self.precision == "fp32" else 2) * values

    def read(self, sample: RawSample) -> Any:
        if self.kind == "text":
            return sample.caption
        return self.images.read(sample.image)

    def truncated(self, inputs: list[Any]) -> int:
        tokenizers = self.folder.tokenizers
        return tokenizers.count_truncated(inputs, tokenizers(inputs).t5) if self.kind == "text" else 0

    def encode(self, inputs: list[Any], device: torch.device) -> list[dict[str, Tensor]]:
        flux = self._loaded or self._load(device)
        if self.kind == "vae":
            found, names = flux.posterior(torch.stack(inputs).to(device)), ("mean", "std")
        else:
            tokens, names = flux.folder.tokenizers(inputs), ("text", "pooled")
            found = flux.encode_text(Tokens(tokens.t5.to(device), tokens.clip.to(device)))
        return [dict(zip(names, row, strict=True)) for row in zip(*found, strict=True)]

    def _load(self, device: torch.device) -> PlacedFlux:
        needed = NEEDED[self.kind]
        with init_context(device, torch.float32 if self.precision == "fp32" else torch.bfloat16):
            flux = PlacedFlux(self.folder, {part: "sharded" if part in needed else "cached" for part in PARTS})
        flux.load()
        self._loaded = flux
        return flux
