"""GPUs of a node before anything runs on them: number, memory, ECC, clocks, NVLink. An unreadable value passes."""

from __future__ import annotations

from ..rank_env import UNBIND
from .figures import figures_of
from .finding import Finding
from .smi import nvlinks, query, uses_mig

FIELDS = {
    "name": "name",
    "memory": "memory.used",
    "ecc": "ecc.errors.uncorrected.volatile.total",
    "clock": "clocks.sm",
    "fastest": "clocks.max.sm",
    "throttle": "clocks_event_reasons.active",
}
FORMER = {"throttle": "clocks_throttle_reasons.active"}
"""Names of fields in older drivers."""
SLOWED = {0x8: "hardware slowdown", 0x20: "heat (driver)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Clock throttle reasons that count as a fault; idle and power cap do not."""
NVLINK_GBS = 200
"""Above what PCIe reaches: a GPU model with more bandwidth within a node has NVLink."""
UNREADABLE = "not readable"


def device_findings(asked: int | None, idle_gib: float, bound: bool = False) -> list[Finding]:
    """Findings on the GPUs visible to this process. asked: GPUs requested by the job, None if unknown.

    bound: the job binds GPUs to tasks, so that seeing fewer is not the machine's fault.
    """
    import torch

    seen = torch.cuda.device_count()
    if bound and asked is not None and seen < asked:
        return [Finding("GPUs", str(seen), f"a task sees {seen} of its node's {asked} GPUs: {UNBIND}")]
    if asked is not None and seen < asked and uses_mig():
        return [Finding("GPUs", str(seen), f"a process uses one MIG instance, {asked} requested: request whole GPUs")]
    if asked is not None and seen != asked:
        return [Finding("GPUs", str(seen), f"{seen} GPUs usable, {asked} requested", own=True)]
    findings = [Finding("GPUs", str(seen))]
    if not seen:
        return findings
    try:
        columns = {name: query(field) for name, field in FIELDS.items()}
        columns |= {name: query(field) for name, field in FORMER.items() if not columns[name]}
        links = [] if uses_mig() else nvlinks()
    except RuntimeError as error:
        return [*findings, Finding("GPU health", "", str(error), own=True)]
    return [
        *findings,
        # Users of the GPU's other instances share its memory.
        Finding("GPU memory", UNREADABLE) if uses_mig() else _memory(columns["memory"], idle_gib),
        _errors(columns["ecc"]),
        _clocks(columns["clock"], columns["fastest"], columns["throttle"]),
        _nvlink(links, columns["name"]),
    ]


def _memory(used: list[str], idle_gib: float) -> Finding:
    mib = [float(value) for value in used if _number(value)]
    if not mib:
        return Finding("GPU memory", UNREADABLE)
    most = max(mib) / 1024
    reason = f"GPU {mib.index(max(mib))} has {most:.1f} GiB in use before the job" if most > idle_gib else ""
    return Finding("GPU memory", f"{most:.1f} GiB in use", reason, own=True)


def _errors(counts: list[str]) -> Finding:
    errors = [int(value) for value in counts if value.isdigit()]
    if not errors:
        return Finding("GPU ECC", UNREADABLE)
    worst = max(errors)
    reason = f"GPU {errors.index(worst)} has {worst} uncorrected ECC errors since its last reset" if worst else ""
    return Finding("GPU ECC", f"{sum(errors)} uncorrected", reason, own=True)


def _nvlink(links: list[list[float]], names: list[str]) -> Finding:
    """All GPUs of a node must have the same links; a GPU model with NVLink must have some, if the node has several."""
    speeds = [sum(gpu) for gpu in links]
    active = [sum(speed > 0 for speed in gpu) for gpu in links]
    if not any(speeds):
        known = figures_of(names[0]) if names else None
        down = len(links) > 1 and known is not None and known.intra_gbs >= NVLINK_GBS
        reason = f"no link of any GPU is up, {names[0]} has NVLink: check the fabric manager" if down else ""
        return Finding("NVLink", "none" if links else UNREADABLE, reason, own=True)
    worst = speeds.index(min(speeds))
    reason = ""
    if speeds[worst] < 0.99 * max(speeds):
        best = speeds.index(max(speeds))
        reason = f"GPU {worst} has {active[worst]} links ({speeds[worst]:.0f} GB/s), GPU {best} {active[best]}"
        reason += f" ({speeds[best]:.0f} GB/s)"
    return Finding("NVLink", f"{min(active)} links, {min(speeds):.0f} GB/s", reason, own=True, same=not reason)


def _clocks(now: list[str], fastest: list[str], throttle: list[str]) -> Finding:
    for device, value in enumerate(throttle):
        active = int(value, 16) if value.startswith("0x") else 0
        reasons = [name for bit, name in SLOWED.items() if active & bit]
        if reasons:
            return Finding("GPU clocks", value, f"GPU {device} is slowed by {', '.join(reasons)}", own=True)
    mhz = [f"{a}/{b}" for a, b in zip(now, fastest, strict=False) if _number(a) and _number(b)]
    return Finding("GPU clocks", f"{', '.join(dict.fromkeys(mhz))} MHz" if mhz else UNREADABLE)


def _number(value: str) -> bool:
    return value.replace(".", "", 1).isdigit()
