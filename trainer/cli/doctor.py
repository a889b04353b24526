"""The `bifrost doctor` command."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...slurm.exit_codes import DONE, USAGE

if TYPE_CHECKING:
    from ..doctor.finding import Check, Finding


def doctor(
    folder: Annotated[Path, typer.Option(help="Folder of runs; a recipe's runs_dir.")] = Path("runs"),
    uri: Annotated[str | None, typer.Option(help="MLflow's tracking URI; default MLFLOW_TRACKING_URI.")] = None,
) -> None:
    """Check this machine: versions, GPUs, compilers, network, folders, Slurm, MLflow, and what to do; exit code 2 when
    something is missing that training needs."""
    findings = examine(folder, uri)
    show(findings)
    sys.stdout.flush()
    # Threads that hang in a dead file system or driver would keep the process alive.
    os._exit(USAGE if any(finding.verdict == "missing" for finding in findings) else DONE)


def examine(folder: Path, uri: str | None) -> list[Finding]:
    """The findings of all checks, within about ten seconds."""
    from ..doctor import folders, machine, software
    from ..doctor.finding import run_checks
    from ..doctor.tracker import mlflow

    checks: list[tuple[str, Check]] = [
        ("Python", software.python),
        ("requirements", software.requirements),
        ("optional packages", software.optional),
        ("package data", software.package_data),
        ("processor", machine.processor),
        ("GPUs", machine.gpus),
        ("compilers", machine.compilers),
        ("network", machine.fabric),
        ("runs", partial(folders.runs_folder, folder)),
        ("TMPDIR", folders.temporary),
        ("cache", folders.cache),
        ("shared memory", folders.shared_memory),
        ("Slurm", _slurm),
        ("MLflow", partial(mlflow, folder, uri, os.environ.get("MLFLOW_TRACKING_URI"))),
    ]
    return run_checks(checks)


def _slurm() -> list[Finding]:
    from ...slurm.reachable import slurm_here
    from ..doctor.finding import Finding

    found, wrong = slurm_here()
    return [Finding("Slurm", found, "warning" if wrong else "ok", wrong)]


def show(findings: list[Finding]) -> None:
    """Print the table and the overall verdict."""
    from rich.table import Table

    from ..terminal import terminal

    table = Table("what", "found", "verdict", "what to do")
    for finding in findings:
        table.add_row(*finding)
    out = terminal()
    out.print(table)
    missing = [finding.what for finding in findings if finding.verdict == "missing"]
    warnings = [finding.what for finding in findings if finding.verdict == "warning"]
    if missing:
        out.print(f"missing: {', '.join(missing)}")
    else:
        out.print("usable" + (f", with warnings on {', '.join(warnings)}" if warnings else ""))
