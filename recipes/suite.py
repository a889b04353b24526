"""Suites of ablations: questions about a recipe, each answered by rows that differ in one choice."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from .load import FOLDER, RecipeError, explain, read_file
from .section import Section

SUITES = FOLDER / "ablations"


class Question(Section):
    asks: str
    """The question, in a sentence."""
    paper: str
    """The row of the paper's choice, with which the others are compared."""
    paper_claims: str | None = None
    """What the paper claims of it; null: it makes no claim that is known here."""
    rows: dict[str, list[str]] = Field(min_length=2)
    """Row -> what is typed for it: `key.path=value` settings of the recipe, and `--option=value` of `bifrost eval`."""

    @model_validator(mode="after")
    def _compared(self) -> Question:
        if self.paper not in self.rows:
            raise ValueError(f"paper: {self.paper!r} is not among the rows {', '.join(self.rows)}")
        return self


class Suite(Section):
    recipe: str
    """A shipped recipe, or the path of one."""
    seeds: list[int] = Field(min_length=1)
    """`seed` of the trainings of every row."""
    settings: list[str] = Field(default_factory=list)
    """Settings of every row."""
    score: list[str]
    """Options of `bifrost eval` for every row: data, scenes, and the run of the other stage."""
    control: Literal["probe", "both", "latents_alone", "reconstruction"] = "probe"
    """Whose scores are compared: the probe's, which need no FLUX, those of images made by both stages, with or without
    the caption for FLUX, or those of stage 2 alone, which reconstructs images from their latents."""
    categories: list[str] = Field(min_length=1)
    """Categories of held-out scenes whose mean is the figure that is compared; of reconstructions one metric, such as
    psnr."""
    questions: dict[str, Question] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_unit(self) -> Suite:
        if self.control == "reconstruction" and len(self.categories) > 1:
            raise ValueError("categories: metrics of reconstructions have no common mean; name one, such as psnr")
        return self


def shipped_suites() -> dict[str, Path]:
    """Name -> file of the suites shipped with the package."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def load_suite(source: str) -> tuple[str, Suite]:
    """Name and contents of the suite `source`, a YAML file or the name of a shipped suite. RecipeError names what is
    wrong."""
    path = Path(source) if Path(source).is_file() else shipped_suites().get(source)
    if path is None:
        raise RecipeError(f"{source}: no such suite; shipped ones are {', '.join(shipped_suites())}")
    try:
        return path.stem, Suite.model_validate(read_file(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, Suite)}") from error
