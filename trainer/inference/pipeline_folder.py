"""The files of a pipeline folder, which `bifrost export --format pipeline` writes and `BifrostPipeline` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RunError
from ..io import read_json
from ..models.hub import locate

INDEX = "model_index.json"
PIPELINE = "pipeline.py"
MLLM, CONTROLNET = "mllm", "controlnet"
"""Sub-folders with the trained weights of stage 1, in the `hf` layout, and of stage 2, a `flux_controlnet` folder."""
CLASS = "BifrostPipeline"
_MODULE = "bifrost.trainer.inference.pipeline_parts"
LOADERS = {MLLM: [_MODULE, "PatchLatentDecoder"], CONTROLNET: [_MODULE, "ControlNet"]}
"""Sub-folder -> module and class that load it, as `model_index.json` names them."""


def open_folder(path: str | Path, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The pipeline folder `path`, or that of a hub id, downloaded once, and its index. RunError names what is wrong."""
    folder = locate(str(path), revision, "pipeline", "*")
    hint = "give a folder that `bifrost export --format pipeline` wrote"
    if not (folder / INDEX).is_file():
        raise RunError(f"{path}: has no {INDEX}; {hint}")
    index = read_json(folder / INDEX)
    if index is None:
        raise RunError(f"{folder / INDEX}: is not JSON; {hint}")
    if (found := index.get("_class_name")) != CLASS:
        raise RunError(f"{folder / INDEX}: is of a {found}, expected {CLASS}; {hint}")
    for name, loader in LOADERS.items():
        if list(index.get(name) or []) != loader:
            raise RunError(f"{folder / INDEX}: {name} is {index.get(name)}, expected {loader}; export it again")
        if not (folder / name).is_dir():
            raise RunError(f"{folder / name}: no such folder; fetch the pipeline again, or export it again")
    return folder, index
