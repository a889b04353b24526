"""Run folders as the first version wrote them: its names, written out here and held to two of its own run folders in
tests/fixtures/first_version (recipe and metrics of tiny-mllm on two ranks and of tiny-controlnet on one)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from bifrost.trainer.checkpoint.manifest import Manifest, read_manifest

FOLDER = Path(__file__).parents[1] / "fixtures" / "first_version"
SETTINGS = {
    "data.shuffle_window": "data.block",
    "data.max_bad_fraction": "data.max_bad_share",
    "flux.placement.vision_encoder": "flux.placement.tower",
    "kernels.head_backend": "kernels.provider",
    "previews": "samples",
    "watchdog.step_timeout_s": "watchdog.step_s",
    "watchdog.startup_timeout_s": "watchdog.start_s",
    "watchdog.save_timeout_s": "watchdog.save_s",
    "zero.overlap_comm": "zero.overlap",
}
LATER = (
    "validation",
    "checkpoint.keep_best",
    "checkpoint.upload",
    "flux.caption_exchange",
    "branch.draws",
    "controlnet.bridge",
    "controlnet.connector",
    "controlnet.weights",
    "controlnet.lora",
    "data.sources",
    "data.captions",
    "data.index_dir",
    "data.buckets",
    "controlnet.latents",
    "controlnet.mllm",
    "controlnet.decode_steps",
    "controlnet.predicted_share",
    "branch.head",
    "branch.flow_head",
    "branch.targets",
    "branch.encoder",
    "branch.init",
    "branch.layers",
    "branch.weights",
    "branch.lora",
    "flux.draws",
    "flux.text_tokens",
    "backbone.vision_encoder",
    "backbone.weights",
    "flux.weights",
    "optimizer.name",
    "optimizer.momentum",
    "tracking.to",
    "tracking.prometheus",
)
"""Settings that the first version did not have."""
METRICS = {
    "allgather_gb_per_s": "gathered_gb_per_s",
    "data_digest": "digest",
    "loss_low_noise": "loss_little_noise",
    "loss_high_noise": "loss_much_noise",
    "rank_work_s_median": "own_s_median",
    "rank_work_s_max": "own_s_max",
    "downtime_s": "gap_s",
}


def recipe(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Settings of today as the first version named them."""
    found = {}
    for key, value in tree.items():
        dotted = f"{path}{key}"
        if dotted in LATER:
            continue
        name = SETTINGS.get(dotted, dotted).rpartition(".")[2]
        found[name] = recipe(value, f"{dotted}.") if isinstance(value, dict) else value
    return found


def age(run: Path) -> None:
    """Make a run folder one that the first version has left: recipe, metrics, and the recipe in its checkpoints."""
    stored = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(stored)))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [{METRICS.get(key, key): value for key, value in record.items()} for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    for folder in (run / "checkpoints").iterdir():
        state, manifest = json.loads((folder / "state.json").read_text()), read_manifest(folder)
        content = json.dumps({**state, "recipe": recipe(state["recipe"])}).encode()
        (folder / "state.json").write_bytes(content)
        write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest, separate: bool = True) -> None:
    """Write the manifest of a checkpoint in format 1: SHA-256 of every file, and, if `separate`, of every slot, which
    the earliest checkpoints lack."""
    files: dict[str, Any] = {}
    for name, entry in manifest.files.items():
        content = (folder / name).read_bytes()
        files[name] = {"size": len(content), "sha256": sha256(content)}
        if separate and name.startswith("rank"):
            files[name]["spans"] = {
                slot: {
                    "start": span.start,
                    "size": span.size,
                    "sha256": sha256(content[span.start : span.start + span.size]),
                }
                for slot, span in entry.spans.items()
            }
    body = {**manifest.model_dump(mode="json"), "format": 1, "files": files}
    body["sha256"] = sha256(json.dumps(body).encode())
    (folder / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
