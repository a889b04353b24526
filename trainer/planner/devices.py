"""Hardware figures for a plan: `devices.yaml` next to this file, or a file of the same format."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..distributed.launcher import has_gpu_files
from ..errors import RunError

FILE = Path(__file__).with_name("devices.yaml")


class Device(BaseModel):
    """One kind of GPU in its node and cluster; units as in `devices.yaml`. Without `bf16_tflops` nothing is timed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    names: tuple[str, ...] = ()
    bf16_tflops: float | None = Field(default=None, gt=0)
    hbm_gb: float = Field(gt=0)
    hbm_gbs: float = Field(gt=0)
    intra_gbs: float = Field(gt=0)
    inter_gbs: float = Field(gt=0)
    gpus_per_node: int = Field(gt=0)
    watts: float = Field(gt=0)
    gemm_efficiency: float = Field(gt=0, le=1)
    attention_efficiency: float = Field(gt=0, le=1)
    link_efficiency: float = Field(gt=0, le=1)
    usable_memory: float = Field(gt=0, le=1)
    runtime_gb: float = Field(ge=0)
    base_latency_us: float = Field(ge=0)
    intra_latency_us: float = Field(ge=0)
    inter_latency_us: float = Field(ge=0)
    small_base_latency_us: float = Field(ge=0)
    small_intra_latency_us: float = Field(ge=0)
    small_inter_latency_us: float = Field(ge=0)
    small_bandwidth: float = Field(gt=0, le=1)
    optimizer_bytes: float = Field(ge=0)
    loader_samples_s: float = Field(gt=0)
    storage_node_gbs: float = Field(gt=0)
    storage_gbs: float = Field(gt=0)

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_node)

    def collective_s(self, received: float, count: int, gpus: int) -> float:
        """Seconds of `count` ring collectives (all-gather, reduce-scatter) over `gpus` GPUs, in which every GPU
        receives `received` bytes in total.

        A ring enters and leaves every node once; NCCL builds as many rings as a node has network ports, so that a node
        receives through all of its ports together. Small messages use a protocol that trades bandwidth for latency, if
        that is faster.
        """
        if gpus == 1:
            return 0.0
        nodes = self.nodes(gpus)
        local = min(gpus, self.gpus_per_node)
        whole = received * gpus / (gpus - 1)
        intra = received / (self.intra_gbs * 1e9)
        inter = whole * (nodes - 1) / nodes / (local * self.inter_gbs * 1e9)
        moved = max(intra, inter) / self.link_efficiency

        def latency(base: float, within: float, between: float) -> float:
            return count * (base + (gpus - nodes) * within + (nodes - 1) * between) * 1e-6

        large = moved + latency(self.base_latency_us, self.intra_latency_us, self.inter_latency_us)
        small = latency(self.small_base_latency_us, self.small_intra_latency_us, self.small_inter_latency_us)
        return min(large, moved / self.small_bandwidth + small)


def find_device(name: str) -> Device:
    """A device by name, or from a file with one device; RunError names the nearest, or what the file lacks."""
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return _only(name)
    known = load(FILE)
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.0)
    raise RunError(f"--device {name}: unknown, nearest is {near[0]} of {', '.join(known)}; or give a file like {FILE}")


def this_device() -> Device | None:
    """The GPU of this machine, if it is known."""
    if not has_gpu_files():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_name()
    return next((device for device in load(FILE).values() if here in device.names), None)


def load(file: Path) -> dict[str, Device]:
    """Name -> device of a file; RunError names the entry that cannot be used."""
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"--device {file}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not isinstance(content.get("devices"), dict):
        raise RunError(f"--device {file}: has no `devices`; begin with a copy of {FILE}")
    found = {}
    for name, own in content["devices"].items():
        try:
            found[str(name)] = Device(name=str(name), **{**content.get("assumed", {}), **(own or {})})
        except (ValidationError, TypeError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("",), "msg": str(error)}
            raise RunError(f"--device {file}: {name}.{'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
    return found


def _only(path: str) -> Device:
    found = load(Path(path))
    if len(found) != 1:
        raise RunError(f"--device {path}: has {len(found)} devices ({', '.join(found)}); leave the one to plan for")
    return next(iter(found.values()))
