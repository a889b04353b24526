"""SkyPilot: a task of managed jobs."""

from __future__ import annotations

import shlex
from typing import Any

from ..errors import SlurmError
from ..exit_codes import STOPPED
from .node import PORT, Run, to_yaml

END = "END OF THE RECIPE"


def skypilot(run: Run) -> str:
    """A task for `sky jobs launch`, which recovers attempts that were preempted or end with exit code 75, and no
    others."""
    settings, job = run.site.skypilot, run.job
    if job.gpus_per_node and not settings.accelerator:
        raise SlurmError("site file: set skypilot.accelerator to the name of the GPUs, such as H200")
    resources: dict[str, Any] = {
        "infra": settings.infra,
        "accelerators": f"{settings.accelerator}:{job.gpus_per_node}" if job.gpus_per_node else None,
        "cpus": f"{job.tasks_per_node * job.cpus_per_task}+",
        "use_spot": settings.use_spot or None,
        "image_id": f"docker:{run.image(settings.image, 'skypilot.image')}",
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [STOPPED]},
    }
    task: dict[str, Any] = {
        "name": run.name,
        "num_nodes": job.nodes[0],
        "resources": {name: value for name, value in resources.items() if value is not None},
        "file_mounts": settings.file_mounts,
        "volumes": settings.volumes,
        "secrets": dict.fromkeys(settings.secrets),
        "run": _run(run),
    }
    return to_yaml({name: value for name, value in task.items() if value})


def _run(run: Run) -> str:
    """The commands of a node: they write the recipe, since a task has no ConfigMap."""
    recipe = f"/tmp/{run.name}.yaml"
    master = f'$(head --lines=1 <<< "$SKYPILOT_NODE_IPS"):{PORT}'
    folder = shlex.quote(run.site.skypilot.folder or run.job.folder)
    script = run.script(recipe, "$SKYPILOT_NODE_RANK", master, STOPPED)
    return f"cd {folder}\ncat > {recipe} << '{END}'\n{run.settings}{END}\n{script}"
