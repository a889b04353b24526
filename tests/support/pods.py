"""Nodes of a rendered manifest as processes of this machine, with the environment that the cluster would give them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

KINDS = ("jobset", "pytorchjob", "skypilot")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "BIFROST_RENDEZVOUS", "BIFROST_LAUNCHER")


def rendered(kind: str, *arguments: str) -> list[dict[str, Any]]:
    """The documents that `bifrost manifest` prints."""
    from bifrost.trainer.cli.main import app

    ended = CliRunner().invoke(app, ["manifest", *arguments, "--kind", kind], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return list(yaml.safe_load_all(ended.output))


def templates(documents: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(number of pods, their template) of a JobSet or a PyTorchJob."""
    spec = documents[-1]["spec"]
    if documents[-1]["kind"] == "JobSet":
        (job,) = (each["template"]["spec"] for each in spec["replicatedJobs"])
        return [(job["completions"], job["template"])]
    return [(each["replicas"], each["template"]) for each in spec["pytorchReplicaSpecs"].values()]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(documents: list[dict[str, Any]], folder: Path, node: int, count: int, address: str) -> subprocess.Popen:
    """Node `node` of `count`: its container's own command, with node 0 at `address` instead of its name in the cluster.

    folder: each node has one in it, where its ConfigMap is mounted, or a task's recipe is written."""
    host, port = address.split(":")
    folder = folder / f"node-{node}"  # with one of both, a node would read its script while the other writes it
    folder.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    kept |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if "kind" not in documents[-1]:
        file = f"{documents[-1]['name']}.yaml"
        text = documents[-1]["run"].replace(f"/tmp/{file}", str(folder / file)).replace(":29500", f":{port}")
        given = {"SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NODE_IPS": f"{host}\n192.0.2.1", "SKYPILOT_NUM_NODES": "2"}
        command, place = ["bash", "-c", text], None
    else:
        (container,) = [template["spec"]["containers"][0] for _, template in templates(documents)][:1]
        (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "run"]
        for name, text in documents[0]["data"].items():
            (folder / name).write_text(text.replace(mount, str(folder)).replace(_master(documents), address))
        command, place = [word.replace(mount, str(folder)) for word in container["command"]], container["workingDir"]
        # The training operator counts pods as ranks.
        given = {"RANK": str(node), "WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": port}
        if documents[-1]["kind"] == "JobSet":
            given = {"JOB_COMPLETION_INDEX": str(node)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**kept, **given}, cwd=place, stdout=pipe, stderr=pipe, text=True)


def _master(documents: list[dict[str, Any]]) -> str:
    """The name of node 0's pod and its port, by the rules of JobSet."""
    name = documents[-1]["metadata"]["name"]
    return f"{name}-node-0-0.{name}:29500"
