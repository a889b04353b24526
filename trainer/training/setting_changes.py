"""Settings that an attempt changes, and whether a run is already finished."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...recipes import RecipeError, load_recipe, with_new_names
from ...slurm.exit_record import newest_step
from ..errors import RunError
from ..io import flat, read_json
from ..monitors.metrics import last_lines, parse_line
from ..optim.train_state import TrainState

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> (old value, new value)."""
FIXED = (
    "seed",
    "global_batch",
    "data.image_size",
    "data.buckets",
    "data.shuffle_window",
    "data.captions",
    "ema",
    "optimizer.name",
)
"""Settings that decide what is trained and on which sequence: a run that continues must not change them, nor its stage,
nor those of `Stage.identity`."""


def last_settings(run: Path) -> dict[str, Any] | None:
    """Settings of the last attempt, from the run folder; None if there is none or this version cannot read it."""
    try:
        return load_recipe(run / "recipe.yaml", stored=True).model_dump(mode="json")
    except RecipeError:
        return None


def changes(now: dict[str, Any], before: dict[str, Any] | None) -> Changes:
    """Settings that differ from those `before`; none without any. `runs_dir` is ignored."""
    if before is None:
        return {}
    current, earlier = dict(flat(now)), dict(flat(_complete(before)))
    keys = sorted((current.keys() | earlier.keys()) - {"runs_dir"})
    pairs = {key: (earlier.get(key), current.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version under their current names, with defaults for newer settings."""
    from pydantic import ValidationError

    from ...recipes import Recipe

    settings = with_new_names(settings)
    try:
        return Recipe.model_validate(settings).model_dump(mode="json")
    except ValidationError:
        return settings


def check_fixed(run: Path, settings: dict[str, Any]) -> None:
    """RunError when `settings` differ from those of the run's last attempt in what a run with a checkpoint must keep.
    For commands, before they start ranks; a rank compares with the checkpoint itself."""
    before = last_settings(run) if newest_step(run) else None
    if before is not None:
        check_stage(settings, before, run)
        check_unchanged(settings, before, FIXED, run)


def check_stage(settings: dict[str, Any], before: dict[str, Any], place: Path) -> None:
    """RunError when the run with settings `before` is of another stage."""
    if before["stage"] != settings["stage"]:
        raise RunError(
            f"{place}: the run {settings['name']} is of stage {before['stage']}, this recipe of stage"
            f" {settings['stage']}: give it another name, such as name=mine"
        )


def check_unchanged(settings: dict[str, Any], before: dict[str, Any], keys: Sequence[str], place: Path) -> None:
    """RunError when one of the dotted `keys` has another value than `before`."""
    before = _complete(before)
    for key in keys:
        was, now = _at(before, key), _at(settings, key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            earlier, current = dict(flat(was, key)), dict(flat(now, key))
            key = next(each for each in {**earlier, **current} if earlier.get(each) != current.get(each))
            was, now = earlier.get(key), current.get(key)
        raise RunError(
            f"{place}: {key} was {_text(was)} in this run and is {_text(now)} now: set it back, or take another name"
            f" than {settings['name']}"
        )


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def describe(found: Changes) -> str:
    """`optimizer.lr 0.003 -> 0.1, micro_batch 8 -> 4`"""
    return ", ".join(f"{key} {_text(before)} -> {_text(now)}" for key, (before, now) in found.items())


def finished(folder: Path, settings: dict[str, Any]) -> int | None:
    """Steps of the run in `folder`, if it has done them all with these `settings` and is not running; else None.

    Only small files are read. Deeper checks, such as the checkpoint's hashes, are left to the training process.
    """
    if (folder / "lock.json").exists():
        return None
    last = _last_record(folder / "metrics.jsonl")
    if last.get("event") != "end" or last.get("outcome") != "finished":
        return None
    checkpoint = folder / "checkpoints" / f"step-{last.get('step', 0):08d}"
    state, manifest = read_json(checkpoint / "state.json"), read_json(checkpoint / "manifest.json")
    if state is None or manifest is None:
        return None
    try:
        done = TrainState(**state["progress"]).done(settings["steps"], settings["validation"]["patience"])
        sizes = all(os.stat(checkpoint / name).st_size == entry["size"] for name, entry in manifest["files"].items())
    except (OSError, KeyError, TypeError, AttributeError):
        return None
    changed = changes(settings, state.get("recipe"))
    return last["step"] if done and sizes and not changed.keys() - {"steps"} else None


def finished_line(folder: Path, settings: dict[str, Any]) -> str | None:
    """A line that a run is finished, and how to continue it; None if it is not, see `finished`."""
    steps = finished(folder, settings)
    if steps is None:
        return None
    how = f"more steps continue it, such as steps={2 * steps}"
    if steps < settings["steps"]:
        how = f"more patience continues it, such as validation.patience={2 * settings['validation']['patience']}"
    return f"{settings['name']} is finished: {steps} steps in {folder}; {how}"


def _last_record(path: Path) -> dict[str, Any]:
    """The last line of a metrics file; empty without one."""
    try:
        return parse_line(last_lines(path, 65536)[-1]) or {}
    except (OSError, IndexError):
        return {}


def _text(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, (str, list, dict, bool)) or value is None
        else str(value)
    )
