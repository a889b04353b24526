"""What `bifrost resume` reads from the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...slurm.run_folder import no_run
from ..errors import RunError
from ..io import read_json


def check_run(run: Path) -> None:
    """RunError unless `run` is a run folder."""
    if (run / "recipe.yaml").is_file():
        return
    above = next((parent for parent in run.absolute().parents if (parent / "recipe.yaml").is_file()), None)
    if above is not None and run.exists():
        raise RunError(f"{run}: is inside the run folder {above}; give that folder, and its newest checkpoint is used")
    if (run / "slurm" / "recipe.yaml").is_file():
        raise RunError(f"{run}: was submitted and has not started yet, see `bifrost slurm status {run}`")
    raise RunError(no_run(run, "recipe.yaml"))


def placed(run: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides for `runs_dir` and `name` from the path `run`, which may have moved since its recipe was written.
    RunError when `overrides` name another run."""
    for override in overrides:
        if override.partition("=")[0] in ("name", "runs_dir"):
            raise RunError(f"{override}: resume continues {run}; a run of another name begins with `bifrost train`")
    folder = run if run.name not in ("", "..") else run.resolve()
    return [f"runs_dir={folder.parent}", f"name={folder.name}"]


def ranks_of(run: Path) -> int | None:
    """Number of ranks of the run's last attempt, None if unknown. RunError if it ran on several nodes."""
    environment = read_json(run / "environment.json") or {}
    hosts = environment.get("hosts")
    if isinstance(hosts, list) and len(hosts) > 1:
        raise RunError(
            f"{run}: ran on {len(hosts)} nodes; continue it there with `bifrost slurm resume {run}` or srun, or here"
            " with --ranks"
        )
    ranks = environment.get("ranks")
    return ranks if isinstance(ranks, int) and ranks > 0 else None
