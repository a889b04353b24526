"""The site file: settings of a cluster that apply to every job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from ..recipes import Section, explain, read_yaml, with_new_names
from ..recipes.renames import SITE
from .errors import SlurmError
from .manifests.settings import Kubernetes, SkyPilot

COPY = "slurm/site.json"
"""Copy in the run folder, as submitted: nodes or containers may not see the site file itself."""


class Container(Section):
    kind: Literal["pyxis", "apptainer"]
    """`pyxis`: srun runs the container through enroot; `apptainer`: every task runs in `apptainer exec`."""
    image: str
    """Image, as passed to `--container-image` or `apptainer exec`."""
    mounts: list[str] = Field(default_factory=list)
    """`outside:inside` folders of runs, shards and models."""
    python: str = "python3"
    """Python inside the image, with the package installed."""


class Fabric(Section):
    interface: str | None = None
    """Network interface that NCCL and gloo use, such as `ib0` (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    hca: str | None = None
    """InfiniBand adapters that NCCL uses, such as `mlx5` (NCCL_IB_HCA)."""


class Site(Section):
    partition: str | None = None
    """Partition, unless --partition is given."""
    account: str | None = None
    """Account, unless --account is given."""
    time: str | None = None
    """Time limit in Slurm's notation, unless --time is given."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores per rank, for its main thread and loader workers; null: data.workers + 2 with GPUs, 1 without."""
    sbatch: list[str] = Field(default_factory=list)
    """Additional sbatch options, such as `--qos=high`."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run at the start of the job, after the modules."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job; `$NAME` in a value is expanded on the first node."""
    python: str | None = None
    """Python on the compute nodes with the package installed; null: the submitting Python."""
    container: Container | None = None
    """Container of the ranks; null: none."""
    fabric: Fabric = Fabric()
    scratch: str | None = None
    """Folder on each node for temporary files and Triton's cache, such as `/local/$USER`; null: TMPDIR."""
    preflight: bool = True
    """Check the nodes before training."""
    preflight_command: str | None = None
    """Shell command that preflight runs on every node; a node where it fails is bad."""
    preflight_limits: dict[str, float] = Field(default_factory=dict)
    """Preflight thresholds that differ from the defaults in docs/preflight.md, such as `free_gib: 100`."""
    requeue: bool = True
    """Requeue jobs; false: a stopped run continues as a new job that depends on the old one."""
    bad_node_file: str | None = None
    """File on shared storage where all runs record bad nodes; null: none."""
    bad_node_threshold: int = Field(default=2, ge=1)
    """A node is excluded once it was found bad this many times."""
    kubernetes: Kubernetes = Kubernetes()
    skypilot: SkyPilot = SkyPilot()

    @field_validator("bad_node_file")
    @classmethod
    def _expand_home(cls, file: str | None) -> str | None:
        return str(Path(file).expanduser()) if file else None

    def variables(self) -> dict[str, str]:
        """Environment variables of a job, including those of fabric and scratch."""
        interface, hca = self.fabric.interface, self.fabric.hca
        return {
            **({"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}),
            **({"NCCL_IB_HCA": hca} if hca else {}),
            **({"BIFROST_SCRATCH": self.scratch} if self.scratch else {}),
            **self.environment,
        }


def site_file() -> Path:
    """BIFROST_SITE, or `~/.config/bifrost/site.yaml`."""
    named = os.environ.get("BIFROST_SITE")
    return Path(named).expanduser() if named else Path.home() / ".config" / "bifrost" / "site.yaml"


def load_site(run: Path | None = None) -> Site:
    """The settings with which `run` was submitted, else those of the site file, else the defaults. Raises SlurmError
    for an invalid file."""
    stored = run is not None and (run / COPY).exists()
    path = run / COPY if run and stored else site_file()
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if "BIFROST_SITE" in os.environ:
            raise SlurmError(f"BIFROST_SITE: {path} does not exist") from None
        return Site()
    except ValueError as error:
        raise SlurmError(f"{path}: not valid YAML: {error}") from error
    try:
        tree = tree or {}
        return Site.model_validate(with_new_names(tree, SITE) if stored else tree)
    except ValidationError as error:
        raise SlurmError(f"{path}: {explain(error, Site)}") from error
