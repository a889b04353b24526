"""The texts of an exported pipeline: its model card, and the licences of what it was trained from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ...recipes.schema import Backbone, Flux
from .model_card import PAPER, bases, licences, metadata, shown_name, training_table
from .reader import CheckpointReader

LICENCES = "LICENCES.md"
_NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*")


class Trained(NamedTuple):
    """Weights of a pipeline: run folder, checkpoint and slot, `master` or `ema`."""

    run: Path
    reader: CheckpointReader
    slot: str


class Use(NamedTuple):
    """What images a pipeline makes. shapes: as `WIDTHxHEIGHT` in pixels; side: of the square that is the default;
    edits: whether it reads source images."""

    shapes: list[str]
    side: int
    edits: bool

    @property
    def square(self) -> bool:
        """Whether the default is among the shapes."""
        return f"{self.side}x{self.side}" in self.shapes

    @property
    def text(self) -> str:
        """For the model card."""
        *others, last = (shape.replace("x", " x ") for shape in self.shapes)
        named = f"{', '.join(others)} or {last}" if others else last
        text = f"Images are {named} pixels"
        if others or not self.square:
            default = "; the square is the default" if self.square else ""
            text += f", width by height, as `width` and `height` of the call choose{default}"
        if not self.edits:
            return f"{text}."
        return (
            f"{text}. Stage 1 was trained on editing pairs: `image` takes a source image, which the prompt is then an"
            " instruction to edit, and with `empty_prompt=True` FLUX does not read this text."
        )


def pipeline_card(trained: dict[str, Trained], backbone: Backbone, flux: Flux, dtype: str, use: Use) -> str:
    """Text of the model card. trained: sub-folder -> its weights, of both stages. backbone, flux: the frozen models,
    with the revisions that the folder names."""
    models = bases(backbone, flux)
    tables = "\n\n".join(f"`{folder}`:\n\n{training_table(*each, dtype)}" for folder, each in trained.items())
    revisions = {"multimodal LLM": backbone.revision, "image generator": flux.revision}
    frozen = "\n".join(
        f"| {role} | `{shown_name(path)}` | {f'`{revisions[role]}`' if revisions[role] else ''} |"
        for role, path in models.items()
    )
    width, height = use.shapes[0].split("x")
    shape = "" if use.square else f", width={width}, height={height}"
    return f"""---
{metadata(models, ["visual-generation-branch", "latent-controlnet"], "diffusers")}
---

# Bifrost-1 pipeline

Images from prompts by both stages of [Bifrost-1]({PAPER}): a visual generation branch predicts the patch latents of an
image from its caption, and a latent ControlNet conditions a frozen FLUX on them. The folder contains what was trained,
and names the frozen models, which are read from where they are published.

```python
from bifrost import BifrostPipeline

pipe = BifrostPipeline.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
pipe("a red apple left of a dog", steps=16{shape}).images[0].save("apple.png")
```

It needs the package bifrost-train. {use.text}

| frozen | | revision |
|---|---|---|
{frozen}

## Training

{tables}

Equal data digests mean the same training samples in the same order. The settings are in `recipes/`.

## Licences

{licences(models, with_base=False)}
"""


def licence_texts(models: dict[str, str], folders: dict[str, Path]) -> str:
    """The licences of the bases `models`, role -> path, and the notices in their `folders`, path -> local folder."""
    text = f"# Licences\n\n{licences(models, with_base=False)}\n"
    for path, folder in folders.items():
        for notice in sorted({file for pattern in _NOTICES for file in folder.glob(pattern) if file.is_file()}):
            content = notice.read_text(encoding="utf-8", errors="replace").strip()
            text += f"\n## {shown_name(path)}: {notice.name}\n\n```text\n{content}\n```\n"
    return text
