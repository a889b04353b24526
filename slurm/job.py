"""The Slurm job of a run: what was requested, stored in the run folder as slurm/job.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..data.atomic import write_atomic
from ..recipes import BatchSplit
from ..recipes.secrets import redact
from .errors import SlurmError
from .io import read_json, write_json
from .run_folder import has_recipe, no_run

RECIPE = "slurm/recipe.yaml"
SCRIPT = "slurm/job.sh"
LOG = "slurm/job.log"
FILE = "slurm/job.json"


class Job(BaseModel):
    """The job of a run; a requeued job keeps its id, a successor gets a new one."""

    name: str
    run: str
    """Absolute path of the run folder."""
    folder: str
    """Working directory; the recipe's relative paths are relative to it."""
    nodes: tuple[int, int]
    """Minimum and maximum number of nodes."""
    gpus_per_node: int
    tasks_per_node: int
    """Ranks per node."""
    cpus_per_task: int = 1
    """Cores per rank."""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    exclude: str | None = None
    array: str | None = None
    grace_s: int
    """Seconds before the time limit at which the ranks get the signal to save; 0: they get none."""
    id: str | None = None
    submitted: float = 0.0
    """Unix time of the user's submission; successor jobs keep it."""
    cancelled: bool = False
    """Cancelled by the user: not requeued."""

    @property
    def node_range(self) -> str:
        low, high = self.nodes
        return str(low) if low == high else f"{low}-{high}"

    @property
    def path(self) -> Path:
        return Path(self.run)

    def save(self) -> None:
        write_json(self.path / FILE, self.model_dump(mode="json"))


def load_job(run: Path) -> Job:
    """The job of a run folder. Raises SlurmError if none was submitted."""
    try:
        found = read_json(run / FILE)
        if found is None:
            if not has_recipe(run):
                raise SlurmError(no_run(run, "recipe.yaml"))
            raise SlurmError(f"{run}: no job was submitted for this run, {FILE} is missing; see bifrost slurm submit")
        return Job.model_validate(found)
    except (ValidationError, ValueError) as error:
        if isinstance(error, SlurmError):
            raise
        raise SlurmError(f"{run / FILE}: not a job description; submit the run again") from error


def write_recipe(run: Path, settings: str) -> None:
    """Write the job's recipe, as YAML, into the run folder, with mode 0600 if it contains a secret."""
    write_atomic(run / RECIPE, settings.encode(), 0o644 if redact(settings) == settings else 0o600)


def parse_nodes(text: str) -> tuple[int, int]:
    """Minimum and maximum number of nodes, from `4` or `2-8`."""
    low, _, high = text.partition("-")
    try:
        least, most = int(low), int(high or low)
    except ValueError:
        raise SlurmError(f"--nodes {text}: give a number, or minimum and maximum, such as 2-8") from None
    if not 1 <= least <= most:
        raise SlurmError(f"--nodes {text}: the minimum must be at least 1 and at most the maximum")
    return least, most


def usable_nodes(global_batch: int, micro_batch: int, tasks_per_node: int, nodes: tuple[int, int]) -> int:
    """The largest number of nodes, from the range `nodes`, whose ranks divide the global batch. Raises SlurmError if
    none does."""
    least, most = nodes
    for count in range(most, least - 1, -1):
        if global_batch % (micro_batch * tasks_per_node * count) == 0:
            return count
    try:
        BatchSplit(global_batch, micro_batch, tasks_per_node * most)
    except ValueError as error:
        raise SlurmError(f"{error}, or choose other --nodes") from None
    raise AssertionError("a batch that divides")


def seconds(limit: str) -> int:
    """A time limit in Slurm's notation: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s."""
    days, dash, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if dash:
            h, m, s = [*parts, 0, 0][:3]
        elif len(parts) == 3:
            h, m, s = parts
        else:
            h, (m, s) = 0, [*parts, 0][:2]
        return ((int(days or 0) * 24 + h) * 60 + m) * 60 + s
    except ValueError:
        raise SlurmError(f"time limit {limit}: use minutes, hours:minutes:seconds or days-hours") from None
