"""Export of a stage-1 and a stage-2 run as one folder that `BifrostPipeline` and diffusers load.

The folder contains what was trained, and names the frozen models with their revisions: FLUX.1-dev's licence does not
allow to pass its weights on with others', and Qwen2.5-VL-7B and FLUX are 50 GB that need no second copy.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...recipes.data import Buckets
from ...recipes.schema import Backbone, Flux
from ...recipes.secrets import redact
from ..checkpoint.export import new_folder, require_layout, require_new, write_weights
from ..checkpoint.model_card import CARD, bases
from ..checkpoint.pipeline_card import LICENCES, Trained, Use, licence_texts, pipeline_card
from ..checkpoint.state import CheckpointWeights
from ..checkpoint.sums import write_sums
from ..errors import RunError
from ..models.controlnet_config import ControlNetConfig
from ..models.flux_config import PARTS
from ..models.hub import commit, locate
from ..stages import open_controlnet, open_patch_latents
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage
from ..versions import version
from .image_shapes import buckets_of, known_to_both, square
from .latent_decoder import require_native
from .pipeline_folder import CONTROLNET, INDEX, LOADERS, MLLM, PIPELINE
from .stored_runs import checkpoint_weights, has_checkpoints, run_and_step, stored_recipe

log = logging.getLogger(__name__)

CODE = '''\
"""Lets `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)` load this folder."""

try:
    from bifrost import BifrostPipeline  # noqa: F401
except ImportError as error:
    raise ImportError("this pipeline needs bifrost-train, the Bifrost training system") from error
'''


class _Run(NamedTuple):
    """A run, or a checkpoint of one, to export."""

    path: Path
    weights: CheckpointWeights

    @classmethod
    def open(cls, path: Path) -> _Run:
        if not has_checkpoints(path):
            raise RunError(f"{path}: is an export; give the run folder that it was made of, or a checkpoint in it")
        return cls(path, checkpoint_weights(path))

    @property
    def trained(self) -> Trained:
        return Trained(run_and_step(self.path)[0], self.weights.reader, self.weights.slot)


def export_pipeline(mllm: Path, controlnet: Path, out: Path, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Write the weights that `bifrost generate` would use of two runs, or of checkpoints of them, into the new folder
    `out`; return their steps. RunError if the runs do not fit together, before anything is written.

    dtype: of the trained weights. With fp32 the folder gives the images of the runs to the bit, in any precision; bf16
    halves it, and does so in bf16 only.
    """
    require_new(out)
    first, second = stored_recipe(mllm, "patch-latents"), stored_recipe(controlnet, "controlnet")
    assert second.flux is not None, "required by the recipe schema"
    stage, other = open_patch_latents(first, for_counting=True), open_controlnet(second, for_counting=True)
    require_native(stage, mllm)
    require_layout(controlnet, second, "public")
    assert isinstance(other.shape, ControlNetConfig)
    found = stage.config.text_config.hidden_size, math.isqrt(stage.tokens_per_image)
    other.shape.require(other.folder.transformer, *found, other.folder.grid(second.flux.image_size))
    use = Use(_shapes(stage, other), second.flux.image_size, stage.edits)
    runs = _Run.open(mllm), _Run.open(controlnet)
    backbone = first.backbone.model_copy(update={"revision": commit(first.backbone.path, first.backbone.revision)})
    flux = second.flux.model_copy(update={"revision": commit(second.flux.path, second.flux.revision)})
    _warn_of_local("backbone", backbone.path)
    _warn_of_local("flux", flux.path)
    recipes = first.model_copy(update={"backbone": backbone}), second.model_copy(update={"flux": flux})
    with new_folder(out) as partial:
        for name, recipe, run, layout in zip((MLLM, CONTROLNET), recipes, runs, ("hf", "public"), strict=True):
            weights = run.weights
            write_weights(partial / name, run.path, weights.reader, weights.slot, recipe, layout, dtype)
            (partial / "recipes").mkdir(exist_ok=True)
            (partial / "recipes" / f"{name}.yaml").write_text(redact(recipe.to_yaml()), encoding="utf-8")
        (partial / PIPELINE).write_text(CODE)
        (partial / INDEX).write_text(json.dumps(_index(flux, second.data.buckets), indent=2) + "\n")
        trained = {name: run.trained for name, run in zip((MLLM, CONTROLNET), runs, strict=True)}
        card = pipeline_card(trained, backbone, flux, str(dtype).removeprefix("torch."), use)
        (partial / CARD).write_text(card, encoding="utf-8")
        (partial / LICENCES).write_text(_licences(backbone, flux), encoding="utf-8")
        write_sums(partial, left_out=[CARD])
    return runs[0].weights.reader.step, runs[1].weights.reader.step


def _shapes(stage: PatchLatentStage, other: ControlNetStage) -> list[str]:
    """The shapes of images that both stages were trained in. RunError if there is none."""
    alone = square(stage.image_size, other.flux.image_size)
    first, second = (buckets_of(each.bucket_rule, alone) for each in (stage, other))
    if not (both := known_to_both(second, [bucket.shapes[0] for bucket in first])):
        raise RunError(
            "the two stages have no shape of images in common (data.buckets); train both in the same buckets"
        )
    return both


def _index(flux: Flux, buckets: Buckets | None) -> dict[str, Any]:
    """`model_index.json`: the classes that load the sub-folders, FLUX, whose parts are not in the folder, and the
    buckets of stage 2."""
    settings = {"path", "revision", "image_size", "text_tokens", "weights"}
    return {
        "_class_name": "BifrostPipeline",
        "_diffusers_version": version("diffusers"),
        **LOADERS,
        **{part: [None, None] for part in PARTS},
        "flux": flux.model_dump(mode="json", include=settings),
        **({"buckets": buckets.model_dump(mode="json")} if buckets else {}),
    }


def _licences(backbone: Backbone, flux: Flux) -> str:
    models = bases(backbone, flux)
    local = [path for path in models.values() if path.startswith("builtin:") or Path(path).is_dir()]
    return licence_texts(models, {path: locate(path) for path in local})


def _warn_of_local(name: str, path: str) -> None:
    if Path(path).is_dir():
        log.warning(
            "%s: a folder of this machine, by which the pipeline names it; on others pass %s=FOLDER_OR_HUB_ID to"
            " from_pretrained",
            path,
            name,
        )
