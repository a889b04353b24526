"""The trials of a suite: which training and which evaluation each row needs for each seed, and the words that start
them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...recipes import RecipeError, load_recipe
from ...recipes.suite import Suite

USUAL = "usual"
"""Name of the training without settings of its own."""


@dataclass(frozen=True)
class Trial:
    """A row of a question with one seed. Rows with equal settings share a training, and with equal options, too, an
    evaluation."""

    question: str
    row: str
    seed: int
    run: Path
    """Run folder of the training."""
    score: Path
    """Folder of the evaluation."""
    train: list[str]
    """Words of the command after `bifrost`."""
    evaluate: list[str]
    steps: int
    """Of the training."""


def trials(suite: Suite, folder: Path, questions: Iterable[str] = ()) -> list[Trial]:
    """All trials, seed by seed, so that a suite that is interrupted has compared its rows on the first seeds.

    questions: only these. RecipeError for a question or a setting that does not exist.
    """
    asked = list(questions) or list(suite.questions)
    for name in asked:
        if name not in suite.questions:
            raise RecipeError(f"no question {name}; this suite has {', '.join(suite.questions)}")
    found = [
        _trial(suite, folder, name, row, words, seed)
        for seed in suite.seeds
        for name in asked
        for row, words in suite.questions[name].rows.items()
    ]
    _require_distinct(found)
    return found


def _require_distinct(found: Iterable[Trial]) -> None:
    """RecipeError if different commands would write the same folder."""
    seen: dict[Path, tuple[Trial, list[str]]] = {}
    for trial in found:
        for place, words in ((trial.run, trial.train), (trial.score, trial.evaluate)):
            other, theirs = seen.setdefault(place, (trial, words))
            if theirs != words:
                raise RecipeError(
                    f"rows {other.row} ({other.question}) and {trial.row} ({trial.question}) would both be"
                    f" {place.name}: write their settings in the same order, or in distinct words"
                )


def _trial(suite: Suite, folder: Path, question: str, row: str, words: list[str], seed: int) -> Trial:
    settings = [word for word in words if not word.startswith("--")]
    options = [word for word in words if word.startswith("--")]
    name = f"{_label(settings) or USUAL}-{seed}"
    run, score = folder / "runs" / name, folder / "scores" / "-".join(filter(None, (name, _label(options))))
    placed = [f"name={name}", f"runs_dir={folder / 'runs'}", f"seed={seed}"]
    train = ["train", suite.recipe, *suite.settings, *settings, *placed]
    try:
        recipe = load_recipe(suite.recipe, train[2:])
    except RecipeError as error:
        raise RecipeError(f"{question}, row {row}: {error}") from error
    trained = "--mllm" if recipe.stage == "patch-latents" else "--controlnet"
    evaluate = ["eval", f"{trained}={run}", *suite.score, *options, f"--out={score}"]
    return Trial(question, row, seed, run, score, train, evaluate, recipe.steps)


def _label(words: list[str]) -> str:
    """A part of a folder's name: of a setting its last key and the end of a path."""
    short = []
    for word in words:
        key, _, value = word.lstrip("-").partition("=")
        short.append(f"{key.split('.')[-1]}-{value.rstrip('/').split('/')[-1]}")
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(short)).strip("-")
