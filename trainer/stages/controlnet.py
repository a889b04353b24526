"""Stage 2: the latent ControlNet, trained by flow matching through a frozen FLUX on patch latents.

Objective and constants are those of diffusers' train_controlnet_flux.py; the public release uses its class and names.

Legend: B samples of a micro-batch, K draws of noise per sample, N patch latents of width D, M packed FLUX tokens of C
channels, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import Dataset
from ...data.bucket_rule import BucketRule
from ...data.spread import Broadcast
from ...recipes.schema import Backbone, ControlNet, Data, Flux, Kernels
from ..distributed.process_group import Gather, Ranks, single_process
from ..errors import RunError
from ..models import latent_controlnet, weights
from ..models.backbone import FrozenBackbone, read_config
from ..models.flux import PARTS, FluxFolder, Part
from ..models.hub import architecture, locate
from ..models.image_grids import ImageGrid, bucket_grids, largest, rule_of, square_grid
from ..models.kernel_selection import KernelChoice, VisionWork, choose_kernels
from ..models.rng import IntArray
from ..models.text_bridge_config import BridgeConfig, TextBridgeConfig, bridge_config
from . import VALIDATION_SEED
from .caption_dropout import CaptionDropout
from .caption_exchange import CaptionExchange
from .controlnet_collate import Cached, ControlNetCollate
from .controlnet_model import LatentControlNetModel
from .encoder_images import EncoderImages
from .flux_outputs import FluxOutputs
from .latent_cache import Cache, FrozenOutputs, FrozenWeights, Kind, Predictor, open_caches
from .patch_latents import grid_side
from .placement import placements
from .vision_outputs import VisionOutputs

VALIDATION_LEVELS = 8
"""Noise levels at which the held-out loss is measured: the middles of as many equal intervals of 0 .. 1, as torchtitan
validates FLUX for MLPerf Training."""


@dataclass
class ControlNetStage:
    """`Stage` of the latent ControlNet."""

    backbone: Backbone
    flux: Flux
    controlnet: ControlNet
    data: Data
    seed: int
    precision: str
    previews: bool
    """Whether the run makes previews, for which cached parts are needed too."""
    config: Any
    """The backbone's Qwen2_5_VLConfig."""
    folder: FluxFolder
    shape: BridgeConfig
    for_counting: bool
    grids: list[list[ImageGrid]] | None = None
    """With `data.buckets`: those of every bucket, by area from the largest."""
    predictor: Predictor | None = None
    """Of the predicted latents, if the recipe uses them."""
    kernels: KernelChoice = field(default_factory=KernelChoice)
    caches: dict[Kind, Cache] | None = None
    """Caches of cached parts, once opened."""
    sums: int = 6
    """Squared error and elements at noise levels up to one half, the same above, tokens, truncated captions."""
    identity: tuple[str, ...] = (
        "controlnet.bridge",
        "controlnet.connector",
        "controlnet.double",
        "controlnet.single",
        "controlnet.norm",
        "controlnet.weights",
        "controlnet.lora",
        "controlnet.latents",
        "controlnet.decode_steps",
        "controlnet.predicted_share",
        "flux.weights",
        "flux.image_size",
        "flux.guidance",
        "flux.text_tokens",
        "flux.draws",
        "flux.caption_dropout",
        "flux.caption_exchange",
    )

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        flux: Flux,
        controlnet: ControlNet,
        data: Data,
        seed: int,
        precision: str,
        previews: bool,
        for_counting: bool = False,
    ) -> ControlNetStage:
        """See `open_stage`."""
        config = read_config((architecture if for_counting else locate)(backbone.path, backbone.revision))
        if for_counting:
            path = architecture(flux.path, flux.revision, "flux.path")
        else:
            path = locate(flux.path, flux.revision, "flux.path", "*/*.safetensors")
        folder = FluxFolder.open(path, flux.weights, flux.text_tokens, for_counting)
        side = grid_side(config, data.image_size)
        sizes = config.vision_config.out_hidden_size, side, folder.grid(flux.image_size)
        shape = bridge_config(controlnet, folder.transformer, *sizes)
        grids = bucket_grids(data.buckets, data.image_size, square_grid(*sizes[1:])) if data.buckets else None
        opened = backbone, flux, controlnet, data, seed, precision, previews, config, folder, shape, for_counting
        return cls(*opened, grids)

    @property
    def source(self) -> str:
        predictor = f", controlnet.mllm={self.controlnet.mllm}" if self.predictor else ""
        return f"backbone.path={self.backbone.path}{predictor} and flux.path={self.flux.path}"

    @property
    def text_limit(self) -> str:
        return f"{self.folder.text_lengths[0]} tokens of T5 (flux.text_tokens)"

    @property
    def image_sizes(self) -> tuple[int, ...]:
        cached = self.flux.placement.vae == "cached"
        return (self.data.image_size, *(() if cached else (self.flux.image_size,)))

    @property
    def bucket_rule(self) -> BucketRule | None:
        if self.data.buckets is None:
            return None
        return rule_of(self.data.buckets, self.data.image_size, self.square, self.flux.image_size)

    @property
    def square(self) -> ImageGrid:
        """The grids of a square image."""
        return square_grid(grid_side(self.config, self.data.image_size), self.folder.grid(self.flux.image_size))

    @property
    def where(self) -> dict[Part, str]:
        """Part of FLUX -> its placement; for counting, all parts are in the model."""
        if self.for_counting:
            return dict.fromkeys(PARTS, "sharded")
        return placements(self.flux, whole=self.previews)

    @property
    def vision_placement(self) -> str:
        """For counting, the vision encoder is in the model; for previews a cached one is too."""
        if self.for_counting:
            return "sharded"
        place = "cached" if self.controlnet.latents == "predicted" else self.flux.placement.vision_encoder
        return "offloaded" if place == "cached" and self.previews else place

    @property
    def condition(self) -> tuple[int, int]:
        """N and D of the patch latents."""
        return grid_side(self.config, self.data.image_size) ** 2, self.config.vision_config.out_hidden_size

    @property
    def latents(self) -> tuple[int, int, int]:
        """Channels, height and width of the VAE's latents of a square."""
        return self._latents(self.square)

    @property
    def latents_by_bucket(self) -> list[tuple[int, int, int]]:
        """The same for every bucket; of the square alone without buckets."""
        return [self._latents(grid) for area in self.grids for grid in area] if self.grids else [self.latents]

    @property
    def largest(self) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]:
        """Of the bucket that takes most memory, or the square: `latents`, and height and width in pixels of the images
        for the vision encoder and for FLUX."""
        if (rule := self.bucket_rule) is None or self.grids is None:
            side, flux_side = self.data.image_size, self.flux.image_size
            return self.latents, (side, side), (flux_side, flux_side)
        number = largest([grid for area in self.grids for grid in area])
        seen, made = rule.buckets[number].shapes
        return self.latents_by_bucket[number], seen, made

    def _latents(self, grid: ImageGrid) -> tuple[int, int, int]:
        return self.folder.vae["latent_channels"], 2 * grid.tokens[0], 2 * grid.tokens[1]

    def choose_kernels(
        self, asked: Kernels, micro_batch: int, precision: str, ranks: Ranks, folder: Path
    ) -> dict[str, dict[str, Any]]:
        self.open_caches(ranks.rank, ranks.size, ranks.gather, ranks.broadcast)  # checked before anything is built
        self.kernels, record = choose_kernels(asked, *self.kernel_work(micro_batch, precision), ranks, folder)
        return record

    def kernel_work(self, micro_batch: int, precision: str) -> tuple[None, VisionWork | None]:
        """The shapes for which kernels are chosen: of no branch, and of the vision encoder, in the largest bucket."""
        cached, (_, seen, _) = self.vision_placement == "cached", self.largest
        return None, None if cached else VisionWork.of(self.config, micro_batch, seen, precision)

    def open_caches(
        self, rank: int = 0, ranks: int = 1, gather: Gather = single_process, broadcast: Broadcast | None = None
    ) -> dict[Kind, Cache]:
        """Open the recipe's caches; raises on all ranks if one does not match the recipe."""
        self.caches = open_caches(self.outputs(), self.data, rank, ranks, gather, broadcast)
        return self.caches

    def outputs(self) -> list[FrozenOutputs]:
        """The outputs that the recipe caches."""
        found: list[FrozenOutputs] = []
        for kind in self.flux.placement.cached:
            if kind != "vision":
                images = EncoderImages(self.flux.image_size, self.bucket_rule, which=1)
                found.append(FluxOutputs(kind, self.folder, images, self.precision))
            elif self.controlnet.latents != "predicted":
                setting = "flux.placement.vision_encoder=cached"
                images = EncoderImages(self.data.image_size, self.bucket_rule)
                found.append(VisionOutputs(setting, self.config, self.backbone_files(), images, self.precision))
        if self.controlnet.latents != "true":
            assert self.predictor is not None, "opened without one"
            found.append(self.predictor)
        return found

    def build(self, activation_checkpointing: bool = False) -> LatentControlNetModel:
        return LatentControlNetModel(self, activation_checkpointing)

    def load(self, model: LatentControlNetModel) -> None:
        model.load(self.backbone_files(), self.seed)

    def frozen(self) -> list[tuple[weights.WeightFiles, list[str]]]:
        files = self.backbone_files()
        with torch.device("meta"):
            found = [(files, list(FrozenBackbone(self.config, text=False).names(files).values()))]
            for part in PARTS:
                files = self.folder.files(part)
                found.append((files, list(self.folder.names(part, self.folder.build(part), files).values())))
        return found

    def predicting(self) -> list[tuple[FrozenWeights, list[str]]]:
        return self.predictor.frozen() if self.predictor else []

    def from_public_checkpoint(self, path: Path) -> tuple[weights.Source, dict[str, str]]:
        if isinstance(self.shape, TextBridgeConfig):
            raise RunError(
                f"init_from={path}: only a run folder has the weights of controlnet.bridge={self.shape.kind}; give one"
            )
        if self.shape.lora:
            files = weights.WeightFiles(path)
            if not any(name.endswith(".lora_A") for name in files.names):
                raise RunError(f"init_from={path}: has no low-rank pairs; give a run that has them, or its hf export")
            with torch.device("meta"):
                model = self.build()
            return files, {name: name for name in [*model.trainable(), *model.statistics()]}
        shape, files = latent_controlnet.read_config(path)
        side = grid_side(self.config, self.data.image_size)
        width = self.config.vision_config.out_hidden_size
        shape.require(self.folder.transformer, width, side, self.folder.grid(self.flux.image_size))
        return files, {f"controlnet.{name}": name for name in files.names}

    def collate(self, dataset: Dataset) -> ControlNetCollate:
        caches = self.caches if self.caches is not None else self.open_caches()
        share = self.flux.caption_exchange
        exchange = CaptionExchange(dataset, self.seed, share) if share else None
        cached = Cached(caches, self.controlnet.drawn_share)
        inputs = self.folder.tokenizers, self.latents_by_bucket, cached, self.seed, self.dropout(dataset)
        return ControlNetCollate(*inputs, exchange=exchange, draws=self.flux.draws)

    def dropout(self, dataset: Dataset) -> CaptionDropout:
        return CaptionDropout(self.seed, self.flux.caption_dropout, self.data, dataset)

    def validation_collates(self, shards: str | list[str], ranks: Ranks) -> dict[str, ControlNetCollate]:
        data = self.data.model_copy(update={"shards": shards, "sources": None})
        caches = open_caches(self.outputs(), data, ranks.rank, ranks.size, ranks.gather, ranks.broadcast)
        middles = [(level + 0.5) / VALIDATION_LEVELS for level in range(VALIDATION_LEVELS)]
        cached = Cached(caches, self.controlnet.drawn_share)
        none = CaptionDropout(VALIDATION_SEED, 0.0)
        inputs = self.folder.tokenizers, self.latents_by_bucket, cached, VALIDATION_SEED, none
        return {f"noise_{middle:.4g}": ControlNetCollate(*inputs, middle) for middle in middles}

    def mean_loss(self, sums: list[float]) -> float:
        squares, count, noisier, noisier_count, *_ = sums
        return (squares + noisier) / (count + noisier_count)

    def normalizer(self, epoch: IntArray, index: IntArray, passes: int, bucket: int = 0) -> float:
        """Elements of FLUX's latents, of all draws, per pass."""
        return len(index) * self.flux.draws * float(np.prod(self.latents_by_bucket[bucket])) / passes

    def report(self, sums: list[float]) -> dict[str, float]:
        squares, count, noisier, noisier_count, _, truncated = sums
        return {
            "loss_low_noise": squares / count if count else 0.0,
            "loss_high_noise": noisier / noisier_count if noisier_count else 0.0,
            **({} if self.flux.placement.text == "cached" else {"captions_truncated": truncated}),
        }

    def tokens(self, sums: list[float]) -> float:
        """Patch latents, text tokens and FLUX's image tokens."""
        return sums[4]

    def backbone_files(self) -> weights.WeightFiles:
        """The files of the MLLM, of which the vision encoder is used."""
        return weights.WeightFiles(locate(self.backbone.path, self.backbone.revision))
