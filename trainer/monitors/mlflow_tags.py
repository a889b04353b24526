"""MLflow tags, parameters and dataset of a run: experiment kind, source, user, commit, stage and training data."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...recipes.secrets import redact
from ..io import flat, read_json

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it, MLflow 3 infers the kind of the experiment from its content."""
LONGEST_VALUE = 6000  # MLflow's limit on the characters of a parameter
LONGEST_TAG = 500


def run_tags(folder: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Tags of a new run; those starting with `mlflow.` fill the columns Source, User and Version."""
    environment = _environment(folder)
    tags = {
        "mlflow.source.name": f"bifrost train {recipe.get('name', folder.name)}",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "mlflow.source.git.commit": environment.get("commit"),
        "bifrost.folder": str(folder),
        "bifrost.stage": recipe.get("stage"),
        "bifrost.ranks": environment.get("ranks"),
        "bifrost.device": environment.get("device"),
        "bifrost.slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    return {key: str(value) for key, value in tags.items() if value}


def parameters(recipe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of each setting, without secrets."""
    for key, value in flat(recipe):
        yield key, redact(value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE]


def dataset_input(folder: Path, recipe: dict[str, Any]) -> Any:
    """The shards as a dataset input; None before their digest is known."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = _environment(folder).get("dataset")
    shards = (recipe.get("data") or {}).get("shards")
    if not known or not shards:
        return None
    address = redact(shards if isinstance(shards, str) else ", ".join(map(str, shards)))
    profile = {"num_rows": known["samples"], "num_shards": known["shards"]}
    source_type = address.partition("://")[0] if "://" in address else "local"
    dataset = Dataset(
        name=address[:LONGEST_NAME],
        digest=known["fingerprint"][:LONGEST_DIGEST],
        source_type=source_type,
        source=json.dumps({"uri": address}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


LONGEST_NAME, LONGEST_DIGEST = 400, 16  # characters; MLflow's limits are 500 and 36


def _environment(folder: Path) -> dict[str, Any]:
    return read_json(folder / "environment.json") or {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return str(os.getuid())
