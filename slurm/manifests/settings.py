"""Sections of the site file for clusters without Slurm."""

from __future__ import annotations

from pydantic import Field

from ...recipes import Section


class Kubernetes(Section):
    namespace: str | None = None
    """Namespace of the objects; null: that of the context in which they are applied."""
    image: str | None = None
    """Image of the pods; null: `container.image`."""
    image_pull_secrets: list[str] = Field(default_factory=list)
    """Names of secrets with which the image is pulled."""
    folder: str | None = None
    """Folder inside the pods to which a recipe's paths are relative; null: the current folder."""
    claims: dict[str, str] = Field(default_factory=dict)
    """Persistent volume claims and where they are mounted; without any: `container.mounts`, from the nodes."""
    secrets: list[str] = Field(default_factory=list)
    """Names of secrets whose keys become environment variables, such as MLflow's password."""
    service_account: str | None = None
    """Service account of the pods."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes."""
    tolerations: list[dict[str, str | int]] = Field(default_factory=list)
    """Tolerations of the pods, as in a pod's specification."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the pods, such as `k8s.v1.cni.cncf.io/networks` for a second network."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource that a GPU is one of."""
    rdma: dict[str, int] = Field(default_factory=dict)
    """Resources for RDMA per pod, such as `rdma/hca_shared_devices: 1`; with any, pods may lock memory."""
    memory_gib: int | None = Field(default=None, ge=1)
    """Memory per pod in GiB, shared memory included; null: no request and no limit."""
    shared_memory_gib: int = Field(default=32, ge=1)
    """Size limit of /dev/shm in GiB, used by NCCL and loader workers."""
    grace_s: int = Field(default=600, ge=1)
    """Seconds between SIGTERM and SIGKILL of an evicted pod, for a last step and save."""
    max_restarts: int = Field(default=10, ge=0)
    """Restarts of a JobSet whose pods end without Bifrost's own exit code, such as one that cannot start."""
    queue: str | None = None
    """Kueue's local queue."""


class SkyPilot(Section):
    infra: str | None = None
    """Where to run, such as `aws/us-east-1` or `kubernetes`; null: SkyPilot chooses."""
    accelerator: str | None = None
    """SkyPilot's name of the GPUs, such as `H200`."""
    use_spot: bool = False
    """Use spot instances."""
    image: str | None = None
    """Image that the task runs in; null: `container.image`."""
    folder: str | None = None
    """Folder on the nodes to which a recipe's paths are relative; null: the current folder."""
    file_mounts: dict[str, str] = Field(default_factory=dict)
    """Folders on the nodes, and the buckets or local folders that are mounted or copied there."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Folders on the nodes, and the volumes that are mounted there."""
    secrets: list[str] = Field(default_factory=list)
    """Names of environment variables whose values `sky jobs launch --secret NAME` passes."""
