"""Patch latents that stage 1 predicts from the captions, for a cache from which stage 2 trains.

Decoding is that of `bifrost generate` with its default schedule, without guidance. The order of a sample's patches, and
the noise of a flow head, are functions of the run's seed and the sample's key, whatever batch or rank it is in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data import RawSample
from ...data.bucket_rule import Bucket, BucketRule, Shape
from ...recipes.schema import ControlNet
from ..checkpoint.state import CheckpointWeights
from ..distributed.process_group import Gather, single_process
from ..errors import RunError
from ..models.backbone import FrozenBackbone
from ..models.image_grids import Grid, patch_grid
from ..models.prompt import PromptTemplate
from ..stages import open_patch_latents
from ..stages.encoder_images import EncoderImages
from ..stages.latent_cache import VERSION, FrozenWeights, Kind
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from .image_shapes import buckets_of
from .latent_decoder import require_native
from .masked_decoding import reveal_counts
from .mllm import decode_prompts, load_mllm
from .settings import Settings
from .stored_runs import checkpoint_weights, has_checkpoints, stored_recipe

TEXT_SETTINGS = (
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)
"""What of the text model's config determines the latents in addition to weights and their shapes."""
PROBE = "a red car left of two blue hearts, and 3 owls"
"""A caption whose token ids stand for tokenizer and chat template."""


class RunWeights:
    """`FrozenWeights` of a stage-1 run or checkpoint, found and verified when they are hashed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: CheckpointWeights | None = None

    @property
    def folder(self) -> Path:
        """The checkpoint that was hashed; a run that is still training may have a newer one."""
        assert self._found is not None, "hashed before it is loaded"
        return self._found.reader.folder

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> str:
        """Hash of the slot's hashes in the manifest, with which the files are compared; it depends on the number of
        ranks that saved them."""
        self._found = self._found or checkpoint_weights(self.path, rank, ranks, gather)
        if missing := [name for name in names if self._found.shape(name) is None]:
            raise RunError(f"{self.path}: holds no parameter {missing[0]}; was it saved by another model?")
        return self._found.content_hash()


class Caption(NamedTuple):
    """What latents are decoded from."""

    text: str
    seed: int
    shape: Grid
    """Rows and columns of the patches."""


class PredictedOutputs:
    """`Predictor` of a stage-1 run, checkpoint or export: `latents` [N, D] decoded from every caption, in the shape of
    its image's bucket."""

    kind: Kind = "predicted"
    empty = False

    def __init__(
        self, settings: ControlNet, seed: int, precision: str, stage: PatchLatentStage, images: EncoderImages
    ) -> None:
        assert settings.mllm is not None and stage.files is not None and stage.tokenizer is not None
        self.path = Path(settings.mllm)
        self.setting = f"controlnet.latents={settings.latents}"
        self.steps = settings.decode_steps
        self.seed = seed
        self.precision = precision
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.stage = stage
        self.images, self.missing = images, images.missing
        self.template = PromptTemplate(stage.tokenizer, stage.branch.max_text_tokens)
        self._run = RunWeights(self.path) if has_checkpoints(self.path) else None
        self._frozen: list[tuple[FrozenWeights, list[str]]] = []
        self._model: PatchLatentModel | None = None

    @classmethod
    def open(
        cls,
        settings: ControlNet,
        seed: int,
        precision: str,
        condition: tuple[int, int],
        rule: BucketRule | None = None,
    ) -> PredictedOutputs:
        """condition: N and D of a square's latents as stage 2 needs them. rule: of its buckets. RunError names what
        cannot be used."""
        assert settings.mllm is not None, "required by the recipe schema"
        where = f"controlnet.mllm={settings.mllm}"
        try:
            recipe = stored_recipe(Path(settings.mllm), "patch-latents")
            stage = open_patch_latents(recipe)
            require_native(stage, Path(settings.mllm))
        except RunError as error:
            raise RunError(f"{where}: {error}") from error
        if recipe.data.only_edits:
            raise RunError(
                f"{where}: was trained on editing pairs alone, and latents are predicted from captions without source"
                " images; name a run that was trained on captions, too"
            )
        found = stage.tokens_per_image, stage.config.text_config.hidden_size
        if found != condition:
            raise RunError(
                f"{where}: predicts {found[0]} patch latents of width {found[1]}, and this recipe's backbone.path and"
                f" data.image_size have {condition[0]} of width {condition[1]}; use the MLLM and image size of that run"
            )
        alone = Bucket(((stage.image_size, stage.image_size),))
        shapes = [bucket.shapes[0] for bucket in buckets_of(stage.bucket_rule, alone)]
        if missing := [str(bucket) for bucket in buckets_of(rule, alone) if bucket.shapes[0] not in shapes]:
            raise RunError(f"{where}: was not trained in {', '.join(missing)}; give both stages the same data.buckets")
        found = cls(settings, seed, precision, stage, EncoderImages(stage.image_size, rule))
        try:
            reveal_counts(min(map(math.prod, found.grids)), settings.decode_steps)
        except RunError as error:
            raise RunError(f"controlnet.decode_steps: {error}") from error
        return found

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of the patches in every bucket, or of the square."""
        return [self._grid(shape) for shape in self.images.shapes]

    def _grid(self, shape: Shape) -> Grid:
        return patch_grid(shape, self.stage.image_size, math.isqrt(self.stage.tokens_per_image))

    def frozen(self) -> list[tuple[FrozenWeights, list[str]]]:
        """The trained weights, and those of the text model under them."""
        if not self._frozen:
            stage, files = self.stage, self.stage.files
            assert files is not None
            with torch.device("meta"):
                text = list(FrozenBackbone(stage.config, vision=False).names(files).values())
                names = list(stage.build().trainable())
            files.require(text)
            if self._run:
                self._frozen = [(self._run, names), (files, text)]
            else:
                source, public = stage.from_public_checkpoint(self.path)
                source.require(public.values())
                self._frozen = [(source, list(public.values())), (files, text)]
        return self._frozen

    def fingerprint(self, rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> dict[str, Any]:
        trained, text = (files.content_hash(names, rank, ranks, gather) for files, names in self.frozen())
        stage, config = self.stage, self.stage.config.text_config
        branch = stage.branch
        return {
            "version": VERSION,
            "kind": self.kind,
            "precision": self.precision,
            "stage-1 weights": trained,
            "text model weights": text,
            "text config": {name: getattr(config, name) for name in TEXT_SETTINGS},
            "backbone.weights": stage.backbone.weights,
            "branch.positions": branch.positions,
            "branch.max_text_tokens": branch.max_text_tokens,
            **({"branch.flow_head.steps": branch.flow_head.steps} if branch.head == "flow" else {}),
            **({"branch.lora.alpha": branch.lora.alpha} if branch.weights == "lora" else {}),
            "prompt": hashlib.sha256(str(self.template.batch([PROBE])[0].tolist()).encode()).hexdigest(),
            "controlnet.decode_steps": self.steps,
            "seed": self.seed,
            **self.images.fingerprint,
        }

    @property
    def sample_bytes(self) -> int:
        largest = max(map(math.prod, self.grids))
        return largest * self.stage.config.text_config.hidden_size * self.dtype.itemsize

    def read(self, sample: RawSample) -> Caption:
        seed = order_seed(self.seed, sample.key)
        return Caption(sample.caption, seed, self._grid(self.images.shape(sample.image)))

    def truncated(self, inputs: list[Caption]) -> int:
        captions = [caption.text for caption in inputs]
        return self.template.count_truncated(captions, self.template.batch(captions)[1])

    def encode(self, inputs: list[Caption], device: torch.device) -> list[dict[str, Tensor]]:
        if self._model is None:
            path = self._run.folder if self._run else self.path
            self._model = load_mllm(path, self.stage, device, self.dtype, vision=False)
        captions, seeds, grids = zip(*inputs, strict=True)
        assert len(set(grids)) == 1, "those of one shape are decoded together"
        found = decode_prompts(self._model, self.template, captions, seeds, Settings(self.steps), grids[0])
        return [{"latents": latents} for latents in found]


def order_seed(seed: int, key: str) -> int:
    """The seed of a sample's decoding, below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little") >> 1
