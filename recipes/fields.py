"""Kinds of settings: paths and shards as they may be written in a recipe."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the name of a run, which is also the name of its folder, and of a source."""


def given(value: object) -> object:
    return "" if value is None else value  # YAML's reading of `data.shards=`


def named_shards(value: str | list[str]) -> str | list[str]:
    """Check the syntax of shard names; whether they exist is checked when they are opened."""
    every = [value] if isinstance(value, str) else value
    if not every or not all(one.strip() for one in every):
        raise ValueError("no shards named; give a path such as /data/train-{00000..00099}.tar")
    for one in every:
        _require_braces(one)
    return expanded(value) if isinstance(value, str) else [expanded(one) for one in value]


def _require_braces(name: str) -> None:
    try:
        from braceexpand import braceexpand
    except ImportError:  # where only an exported pipeline is used, whose recipe names shards that nobody opens
        return
    try:
        next(braceexpand(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; write ranges as {{00000..02047}}") from None


def expanded(value: str) -> str:
    """A path with `~` expanded. A shell expands it only at the beginning of a word, not in `data.shards=~/x`, and never
    in YAML; removing a folder named `~` by accident may remove the home folder."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"{value}: no home folder is known for {value.split('/')[0]}; write the path out")
    if variable := re.match(r"\$\{?\w+\}?", path):
        raise ValueError(f"{value}: {variable[0]} is not expanded in a recipe; write the path out")
    return path


def tracking_uri(value: str) -> str:
    """Refuse a folder, in which MLflow no longer keeps runs, and a missing scheme."""
    if value.startswith("file:") or ("://" not in value and value != "databricks"):
        raise ValueError(
            f"{value}: names no tracking server or database; give http://HOST:PORT, or sqlite:///FOLDER/mlflow.db"
        )
    return value


def distinct(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("names one twice; name each once")
    return values


Shards = Annotated[str | list[str], BeforeValidator(given), AfterValidator(named_shards)]
Place = Annotated[str, AfterValidator(expanded)]
OptionalPlace = Place | None
TrackingUri = Annotated[str, AfterValidator(tracking_uri)]
Trackers = Annotated[list[Literal["mlflow", "tensorboard", "wandb"]], Field(min_length=1), AfterValidator(distinct)]
HeldWeights = Literal["bf16", "int8", "fp8"]
"""How frozen linear layers hold their weights."""
