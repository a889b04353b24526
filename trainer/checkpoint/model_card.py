"""The model card of an export: what the weights are, what they were trained from, and the licences.

A card is the `README.md` of a model folder, with metadata for the Hugging Face hub at its top.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...recipes import Recipe
from ...recipes.schema import Backbone, Flux
from ...recipes.secrets import redact
from ..io import read_json
from ..versions import BIFROST
from .reader import CheckpointReader

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2508.05954"

log = logging.getLogger(__name__)


class Licence(NamedTuple):
    """name: full name. id: as in the hub's metadata, one of its ids or a custom name. link: to the licence text."""

    name: str
    id: str
    link: str
    common: bool = False
    """Whether `id` is one of the hub's own licence ids."""


APACHE = Licence("Apache License 2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", common=True)
LICENCES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Licence(
        "Qwen Research License (no commercial use)",
        "qwen-research",
        "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": APACHE,
    "black-forest-labs/FLUX.1-dev": Licence(
        "FLUX.1 [dev] Non-Commercial License",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
}
"""Hub id -> licence, for the bases of the shipped recipes, as stated in their model cards."""
OPENMOJI = Licence(
    "CC BY-SA 4.0: trained on drawings of OpenMoji (https://openmoji.org)",
    "cc-by-sa-4.0",
    "https://creativecommons.org/licenses/by-sa/4.0/",
    common=True,
)
"""Licence of the models bundled with the package, `builtin:NAME`."""


def licence_of(path: str) -> Licence | None:
    """Licence of the base at `path`: `builtin:NAME`, a hub id, or a folder with a model card. None if unknown.

    Nothing is downloaded. An unreadable card is logged and counts as missing.
    """
    if path.startswith("builtin:"):
        return OPENMOJI
    card = Path(path) / CARD
    if path in LICENCES or not card.is_file():
        return LICENCES.get(path)
    from huggingface_hub.repocard import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s: its licence cannot be read (%s); state it in the new card yourself", card, error)
        return None
    found = metadata.get("license")
    if not isinstance(found, str):
        return None
    if found != "other":
        return Licence(found, found, str(metadata.get("license_link") or f"the card of {Path(path).name}"), common=True)
    name = str(metadata.get("license_name") or "other")
    return Licence(name, name, str(metadata.get("license_link") or f"the card of {Path(path).name}"))


def card(run: Path, reader: CheckpointReader, slot: str, dtype: str, with_base: bool) -> str:
    """Text of the model card for weights exported from `reader`, a checkpoint of the run in folder `run`, with the
    recipe that the checkpoint was trained with.

    slot: `master` or `ema`. with_base: whether the export includes the frozen base.
    """
    recipe = Recipe.model_validate(reader.state["recipe"])
    settings = redact(recipe.to_yaml()).strip()
    models = bases(recipe.backbone, recipe.flux if recipe.stage == "controlnet" else None)
    tag = "latent-controlnet" if recipe.stage == "controlnet" else "visual-generation-branch"
    return f"""---
{metadata(models, [tag])}
---

# {recipe.name}

{_what(recipe.stage, with_base)}
Method: [Bifrost-1]({PAPER}).

## Training

{training_table(run, reader, slot, dtype)}

Equal data digests mean the same training samples in the same order.

## Licences

{licences(models, with_base)}

## Recipe

```yaml
{settings}
```
"""


def training_table(run: Path, reader: CheckpointReader, slot: str, dtype: str) -> str:
    """What is recorded of the training of the exported weights; arguments as of `card`."""
    state: dict[str, Any] = reader.state
    recipe = Recipe.model_validate(state["recipe"])
    progress = state.get("progress", {})
    environment = read_json(run / "environment.json") or {}
    trained = environment.get("versions", {})
    rows = [
        ("recipe", f"`{recipe.name}`, stage `{recipe.stage}`"),
        ("step", f"{reader.step:,}"),
        ("samples", f"{progress['samples']:,}" if "samples" in progress else "unknown"),
        ("weights", f"{'moving average (EMA)' if slot == 'ema' else 'as trained'}, {dtype}"),
        ("data digest", f"`{progress.get('digest') or 'unknown'}`"),
        ("shards fingerprint", f"`{state.get('data') or 'unknown'}`"),
        ("frozen base, SHA-256", f"`{state.get('backbone') or 'unknown'}`"),
        ("trained with", ", ".join(f"{name} {version}" for name, version in trained.items()) or "unknown"),
        ("exported with", f"bifrost {BIFROST}"),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def bases(backbone: Backbone, flux: Flux | None) -> dict[str, str]:
    """Role -> path of the models that the weights were trained from, starting with the one whose layers were copied.
    flux: that of stage 2."""
    return {**({"image generator": flux.path} if flux else {}), "multimodal LLM": backbone.path}


def shown_name(path: str) -> str:
    """The name of the base at `path`, without the private parent folders of a local one."""
    return Path(path).name if Path(path).is_dir() else path


def _what(stage: str, with_base: bool) -> str:
    if stage == "controlnet":
        return (
            "Stage 2 of Bifrost-1: the latent ControlNet, which conditions a frozen FLUX on the patch latents of a"
            " multimodal LLM's vision encoder. Use it with `bifrost generate --controlnet THIS_FOLDER --flux FLUX`."
        )
    content = "with the frozen multimodal LLM that it extends" if with_base else "without the multimodal LLM"
    return (
        f"Stage 1 of Bifrost-1: the visual generation branch, which predicts the patch latents of an image from its"
        f" caption, {content}. Use it with `bifrost generate --mllm THIS_FOLDER`."
    )


def metadata(models: dict[str, str], tags: list[str], library: str | None = None) -> str:
    """The hub's metadata of weights trained from `models`, of which the first one's licence is stated."""
    from huggingface_hub import ModelCardData

    paths = list(models.values())
    found = licence_of(paths[0])
    on_hub = [path for path in paths if path.count("/") == 1 and not Path(path).is_dir()]
    data = ModelCardData(
        base_model=on_hub or None,
        license=(found.id if found.common else "other") if found else None,
        license_name=found.id if found and not found.common else None,
        license_link=found.link if found and not found.common else None,
        library_name=library,
        pipeline_tag="text-to-image",
        tags=["bifrost-1", *tags],
    )
    return data.to_yaml().strip()


def licences(models: dict[str, str], with_base: bool) -> str:
    """The licences of `models`, role -> path, for weights trained from them."""
    lines = []
    for role, path in models.items():
        found = licence_of(path)
        name = shown_name(path)
        known = f"{found.name}, {found.link}" if found else "unknown to Bifrost; see its own model card"
        lines.append(f"- {role} `{name}`: {known}")
    kind = "contain weights of, and are trained from," if with_base else "are trained from"
    return (
        f"These weights {kind} the following models. Comply with their licences:\n\n"
        + "\n".join(lines)
        + "\n- training images and captions: not recorded; their owners' terms may apply as well\n\n"
        "The software is licensed under Apache-2.0; that licence does not cover the weights."
    )
