"""Kubernetes: a ConfigMap with recipe and script, and a JobSet or a PyTorchJob of one pod per node."""

from __future__ import annotations

from typing import Any

from ..exit_codes import STOPPED, USAGE
from .node import PORT, Run, to_yaml

FOLDER = "/etc/bifrost"
"""Where pods see the ConfigMap."""
RECIPE, SCRIPT = "recipe.yaml", "node.sh"
CONTAINER, PORT_NAME = "pytorch", "pytorchjob-port"
"""By these names the training operator finds container and port."""
AGAIN = 138
"""The training operator starts a pod again for exit codes from 128; 138 is its code for that purpose."""
JOB = "node"
QUEUE = "kueue.x-k8s.io/queue-name"


def jobset(run: Run) -> str:
    """A JobSet (jobset.x-k8s.io/v1alpha2) of one indexed job.

    Exit code 2 fails the JobSet. Pods that were evicted, or ended with exit code 75, are replaced without being
    counted; any other end restarts the JobSet, max_restarts times at most.
    """
    master = f"{run.name}-{JOB}-0-0.{run.name}:{PORT}"
    script = run.script(f"{FOLDER}/{RECIPE}", "$JOB_COMPLETION_INDEX", master, STOPPED)
    count = run.job.nodes[0]
    exits = {"containerName": CONTAINER, "operator": "In"}
    job = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {**exits, "values": [USAGE]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {**exits, "values": [STOPPED]}},
            ]
        },
        "template": _pod(run, {"restartPolicy": "Never"}),
    }
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": run.site.kubernetes.max_restarts,
            "restartStrategy": "BlockingRecreate",
            "rules": [{"name": "stopped", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
    }
    return to_yaml(
        _config_map(run, script),
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(run), "spec": spec},
    )


def pytorchjob(run: Run) -> str:
    """A PyTorchJob (kubeflow.org/v1) of a master and workers.

    Exit code 2 fails the job; pods that end otherwise, or are evicted, are replaced.
    """
    script = run.script(f"{FOLDER}/{RECIPE}", "$RANK", "$MASTER_ADDR:$MASTER_PORT", AGAIN)
    count = run.job.nodes[0]
    replicas = {"Master": 1, **({"Worker": count - 1} if count > 1 else {})}
    spec = {
        "runPolicy": {"cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": {
            kind: {"replicas": number, "restartPolicy": "ExitCode", "template": _pod(run, {})}
            for kind, number in replicas.items()
        },
    }
    return to_yaml(
        _config_map(run, script),
        {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(run), "spec": spec},
    )


def _metadata(run: Run) -> dict[str, Any]:
    settings = run.site.kubernetes
    return {
        "name": run.name,
        **({"namespace": settings.namespace} if settings.namespace else {}),
        **({"labels": {QUEUE: settings.queue}} if settings.queue else {}),
    }


def _config_map(run: Run, script: str) -> dict[str, Any]:
    namespace = run.site.kubernetes.namespace
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{run.name}-run", **({"namespace": namespace} if namespace else {})},
        "data": {RECIPE: run.settings, SCRIPT: script},
    }


def _pod(run: Run, more: dict[str, Any]) -> dict[str, Any]:
    """The template of a pod. more: further fields of its specification."""
    settings = run.site.kubernetes
    wanted = {
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
    }
    volumes, mounts = _volumes(run)
    spec = {
        **more,
        **{name: value for name, value in wanted.items() if value},
        "terminationGracePeriodSeconds": settings.grace_s,
        "containers": [_container(run, mounts)],
        "volumes": volumes,
    }
    return {**({"metadata": {"annotations": settings.annotations}} if settings.annotations else {}), "spec": spec}


def _container(run: Run, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    settings, job = run.site.kubernetes, run.job
    memory = {"memory": f"{settings.memory_gib}Gi"} if settings.memory_gib else {}
    devices = {**({settings.gpu_resource: job.gpus_per_node} if job.gpus_per_node else {}), **settings.rdma}
    cores = {"cpu": job.tasks_per_node * job.cpus_per_task}
    return {
        "name": CONTAINER,
        "image": run.image(settings.image, "kubernetes.image"),
        "command": ["bash", f"{FOLDER}/{SCRIPT}"],
        "workingDir": settings.folder or job.folder,
        **({"envFrom": [{"secretRef": {"name": name}} for name in settings.secrets]} if settings.secrets else {}),
        "ports": [{"name": PORT_NAME, "containerPort": PORT}],
        "resources": {"requests": cores | memory | devices, "limits": memory | devices},
        **({"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}} if settings.rdma else {}),
        "volumeMounts": mounts,
    }


def _volumes(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod, and where its container mounts them."""
    settings, container = run.site.kubernetes, run.site.container
    shared = {"medium": "Memory", "sizeLimit": f"{settings.shared_memory_gib}Gi"}
    found: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "run", "configMap": {"name": f"{run.name}-run"}}, {"mountPath": FOLDER, "readOnly": True}),
        ({"name": "shm", "emptyDir": shared}, {"mountPath": "/dev/shm"}),
    ]
    for claim, path in settings.claims.items():
        volume = {"name": f"data-{len(found) - 2}", "persistentVolumeClaim": {"claimName": claim}}
        found.append((volume, {"mountPath": path}))
    for mount in [] if settings.claims or container is None else container.mounts:
        outside, inside, *flags = mount.split(":") if ":" in mount else (mount, mount)
        volume = {"name": f"data-{len(found) - 2}", "hostPath": {"path": outside}}
        found.append((volume, {"mountPath": inside, **({"readOnly": True} if "ro" in flags else {})}))
    return [volume for volume, _ in found], [{"name": volume["name"], **place} for volume, place in found]
