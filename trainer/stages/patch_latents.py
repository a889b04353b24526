"""Stage 1: predict the latents of masked patches from the caption and the visible patches."""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data import Dataset
from ...data.bucket_rule import BucketRule, Shape
from ...data.spread import Broadcast
from ...recipes.schema import Backbone, Branch, Data, Flux, Kernels
from ..distributed.process_group import Gather, Ranks, single_process
from ..errors import RunError
from ..models import weights
from ..models.backbone import FrozenBackbone, read_config
from ..models.backbone_config import branch_layers, grid_side, require_targets
from ..models.hub import architecture, locate
from ..models.image_grids import Grid, latent_buckets
from ..models.kernel_selection import KernelChoice, KernelWork, VisionWork, choose_kernels
from ..models.masking import hidden_counts
from ..models.prompt import PromptTemplate, load_tokenizer
from ..models.rng import IntArray
from . import VALIDATION_SEED
from .base_texts import BaseTextCollate
from .branch_weights import text_layer
from .caption_dropout import CaptionDropout
from .encoder_images import EncoderImages
from .latent_cache import Cache, FrozenOutputs, FrozenWeights, Kind, open_caches
from .patch_latent_collate import PatchLatentCollate
from .patch_latent_model import PatchLatentModel
from .target_encoders import TargetEncoder, TargetVae, open_target_encoder
from .vision_outputs import VisionOutputs

VALIDATION_RATES = 4
"""Mask rates at which the held-out loss is measured, equidistant over the recipe's range."""


@dataclass
class PatchLatentStage:
    """`Stage` of the patch latents."""

    backbone: Backbone
    branch: Branch
    image_size: int
    seed: int
    config: Any
    """The backbone's Qwen2_5_VLConfig."""
    tokens_per_image: int
    """Patches of a square image."""
    files: weights.WeightFiles | None
    tokenizer: PreTrainedTokenizerBase | None
    kernels: KernelChoice = field(default_factory=KernelChoice)
    data: Data | None = None
    """Its shards are those of the cache."""
    precision: str = "fp32"
    for_counting: bool = False
    """Whether all parts are in the model, to be counted."""
    edits: bool = False
    """Whether some samples are editing pairs."""
    texts: bool = False
    """Whether there are understanding sources."""
    caches: dict[Kind, Cache] | None = None
    """The cache of the patch latents if the recipe has one, once opened."""
    encoder: TargetVae | TargetEncoder | None = None
    """What encodes targets other than native ones, if it is an encoder."""
    grids: tuple[Grid, ...] = ()
    """Rows and columns of patches in every bucket, by its number; of the square alone without buckets."""
    bucket_rule: BucketRule | None = None
    sums: int = 4
    """Squared error of the masked patches, their number, tokens of text and image, truncated captions."""
    identity: tuple[str, ...] = ("branch", "backbone.weights")

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        branch: Branch,
        data: Data,
        seed: int,
        precision: str,
        flux: Flux | None = None,
        for_counting: bool = False,
    ) -> PatchLatentStage:
        """See `open_stage`."""
        image_size = data.image_size
        folder = (architecture if for_counting else locate)(backbone.path, backbone.revision)
        config = read_config(folder)
        side = grid_side(config, image_size)
        branch_layers(config, branch.layers)  # refuses more than there are
        require_targets(config, branch.targets, image_size)
        encoder = open_target_encoder(branch, flux, image_size, side, for_counting)
        grids, rule = latent_buckets(data, side)
        more: dict[str, Any] = {"precision": precision, "encoder": encoder, "grids": grids, "bucket_rule": rule}
        more |= {"edits": data.edits, "texts": bool(data.understanding)}
        if for_counting:
            opened = image_size, seed, config, side**2, None, None
            return cls(backbone, branch, *opened, **more, for_counting=True)
        tokenizer = load_tokenizer(folder)
        PromptTemplate(tokenizer, branch.max_text_tokens)  # refuses a limit that no prompt fits
        files = weights.WeightFiles(folder)
        opened = image_size, seed, config, side**2, files, tokenizer
        stage = cls(backbone, branch, *opened, data=data, **more)
        if encoder:
            stage.identity = (*stage.identity, *encoder.identity)
        return stage

    @property
    def encodes(self) -> bool:
        """Whether training runs the vision encoder."""
        return self.backbone.vision_encoder != "cached" and self.branch.targets == "native"

    @property
    def source(self) -> str:
        other = f" and {self.encoder.source}" if self.encoder else ""
        return f"backbone.path={self.backbone.path}{other}"

    @property
    def text_limit(self) -> str:
        return f"{self.branch.max_text_tokens} tokens of a prompt (branch.max_text_tokens)"

    @property
    def image_sizes(self) -> tuple[int, ...]:
        return (self.image_size,)

    @property
    def largest(self) -> tuple[Grid, Shape]:
        """Of the bucket that takes most memory, or the square: rows and columns of patches, and height and width of the
        images in pixels."""
        rows, columns = grid = max(self.grids, key=math.prod)
        unit = self.image_size // math.isqrt(self.tokens_per_image)
        return grid, (unit * rows, unit * columns)

    def choose_kernels(
        self, asked: Kernels, micro_batch: int, precision: str, ranks: Ranks, folder: Path
    ) -> dict[str, dict[str, Any]]:
        self.open_caches(ranks.rank, ranks.size, ranks.gather, ranks.broadcast)  # checked before anything is built
        self.kernels, record = choose_kernels(asked, *self.kernel_work(micro_batch, precision), ranks, folder)
        return record

    def kernel_work(self, micro_batch: int, precision: str) -> tuple[KernelWork, VisionWork | None]:
        """The shapes for which kernels are chosen: of the branch and of the vision encoder, in the largest bucket."""
        grid, pixels = self.largest
        patches, pairs = math.prod(grid), int(self.edits)  # at most one source image per sample
        shapes = micro_batch, patches, self.branch.max_text_tokens + pairs * patches
        encoder = self.config if self.encodes else getattr(self.encoder, "config", None)
        vision = None if encoder is None else VisionWork.of(encoder, (1 + pairs) * micro_batch, pixels, precision)
        return KernelWork.of(self.config, *shapes, precision, self.branch.draws), vision

    def outputs(self) -> list[FrozenOutputs]:
        """The outputs that the recipe caches."""
        if self.backbone.vision_encoder != "cached":
            return []
        assert self.files is not None
        images = EncoderImages(self.image_size, self.bucket_rule)
        return [VisionOutputs("backbone.vision_encoder=cached", self.config, self.files, images, self.precision)]

    def open_caches(
        self, rank: int = 0, ranks: int = 1, gather: Gather = single_process, broadcast: Broadcast | None = None
    ) -> dict[Kind, Cache]:
        """Open the recipe's caches; raises on all ranks if one does not match the recipe."""
        assert self.data is not None
        self.caches = open_caches(self.outputs(), self.data, rank, ranks, gather, broadcast)
        return self.caches

    def build(self, activation_checkpointing: bool = False, vision: bool | None = None) -> PatchLatentModel:
        """vision: with the vision encoder; None: if training runs it."""
        place = "sharded" if self.for_counting else self.backbone.placement
        settings = self.branch, self.image_size, activation_checkpointing
        if vision is None:
            vision = self.encodes or (self.for_counting and self.branch.targets == "native")
        model = PatchLatentModel(self.config, *settings, self.kernels, place, vision, self.backbone.weights)
        if self.texts:
            model.measure_base_loss()
        if self.encoder:
            width = self.config.text_config.hidden_size
            model.use_targets(self.encoder.targets(self.tokens_per_image, width, self.kernels))
        return model

    def load(self, model: PatchLatentModel) -> None:
        assert self.files is not None
        model.load(self.files, self.seed)

    def frozen(self) -> list[tuple[weights.WeightFiles, list[str]]]:
        assert self.files is not None
        with torch.device("meta"):
            backbone = FrozenBackbone(self.config)
        found = [(self.files, list(backbone.names(self.files).values()))]
        return [*found, self.encoder.frozen()] if self.encoder else found

    def predicting(self) -> list[tuple[FrozenWeights, list[str]]]:
        return []

    def from_public_checkpoint(self, path: Path) -> tuple[weights.WeightFiles, dict[str, str]]:
        files = weights.WeightFiles(path)
        own = files.shape("branch.mask_token") is not None  # the names of `bifrost export --format hf`
        if not own and self.branch.weights == "lora":
            raise RunError(f"{path}: the public layout has no low-rank pairs; give a run with them, or its hf export")
        with torch.device("meta"):
            model = self.build()
        if self.branch.head == "flow" and not own:
            raise RunError(f"{path}: has the public layout, with a linear head; set branch.head=linear")
        layers, names = branch_layers(self.config, self.branch.layers), [*model.trainable(), *model.statistics()]
        return files, {name: name if own else weights.public_name(text_layer(name, layers)) for name in names}

    def collate(self, dataset: Dataset) -> PatchLatentCollate:
        assert self.tokenizer is not None
        caches = self.caches if self.caches is not None else self.open_caches()
        shapes = self.seed, self.grids
        return PatchLatentCollate(self.tokenizer, self.branch, *shapes, caches.get("vision"), self.dropout(dataset))

    def text_collate(self) -> BaseTextCollate:
        """Items of an understanding source -> arguments of the model, which are those of `base_loss`."""
        assert self.tokenizer is not None
        return BaseTextCollate(self.tokenizer, self.tokens_per_image, self.branch.max_text_tokens)

    def dropout(self, dataset: Dataset) -> CaptionDropout:
        return CaptionDropout(self.seed, self.branch.caption_dropout, self.data, dataset)

    def validation_collates(self, shards: str | list[str], ranks: Ranks) -> dict[str, PatchLatentCollate]:
        assert self.tokenizer is not None
        assert self.data is not None
        held_out = self.data.model_copy(update={"shards": shards, "sources": None})
        caches = open_caches(self.outputs(), held_out, ranks.rank, ranks.size, ranks.gather, ranks.broadcast)
        rate, found = self.branch.mask_rate, {}
        for fixed in sorted(set(np.linspace(rate.low, rate.high, VALIDATION_RATES).tolist())):
            always = rate.model_copy(update={"low": fixed, "high": fixed})
            branch = self.branch.model_copy(update={"caption_dropout": 0.0, "mask_rate": always, "draws": 1})
            shapes = VALIDATION_SEED, self.grids
            collate = PatchLatentCollate(self.tokenizer, branch, *shapes, caches.get("vision"))
            found[f"mask_{fixed:.4g}"] = collate
        return found

    def mean_loss(self, sums: list[float]) -> float:
        return self.report(sums)["loss_masked"]

    def normalizer(self, epoch: IntArray, index: IntArray, passes: int, bucket: int = 0) -> float:
        """Tokens of the loss average per pass."""
        draws, patches = self.branch.draws, math.prod(self.grids[bucket])
        if self.branch.loss_tokens == "all":
            return len(index) * draws * patches / passes
        counts = hidden_counts(self.branch.mask_rate, self.seed, epoch, index, patches, draws)
        return float(counts.sum()) / passes

    def report(self, sums: list[float]) -> dict[str, float]:
        squares, masked, _, truncated = sums
        return {"loss_masked": squares / masked if masked else 0.0, "captions_truncated": truncated}

    def tokens(self, sums: list[float]) -> float:
        """Text tokens and patches."""
        return sums[2]
