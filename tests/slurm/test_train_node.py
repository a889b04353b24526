"""The nodes of rendered manifests, run for real: two processes in place of two pods, with one rank each."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pods
import runs
from bifrost.slurm.exit_codes import STOPPED, USAGE

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container = {"kind": "pyxis", "image": "lab/bifrost:1", "python": sys.executable}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"container": container}))
    monkeypatch.setenv("BIFROST_SITE", str(tmp_path / "site.yaml"))


def manifest(kind: str, shards: Path, runs_dir: Path, *overrides: str) -> list[dict]:
    _, *arguments = runs.arguments(shards, runs_dir, *overrides)
    return pods.rendered(kind, *arguments, "--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1")


def two_nodes(documents: list[dict], folder: Path, last_first: bool = True) -> list[subprocess.Popen]:
    """Both nodes, started in the order that is the harder one: node 1 waits for node 0's address."""
    address = pods.free_address()
    order = (1, 0) if last_first else (0, 1)
    started = {node: pods.start(documents, folder, node, 2, address) for node in order}
    return [started[0], started[1]]


def ended(nodes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each node."""
    found = []
    for node in nodes:
        out, err = node.communicate(timeout=300)
        found.append((node.returncode, out, err))
    return found


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run with two ranks that the launcher starts on this machine."""
    folder = tmp_path_factory.mktemp("local")
    with runs.launched([*runs.arguments(shards, folder, "steps=3"), "--ranks", "2"]) as process:
        assert process.wait(300) == 0
    return runs.losses(folder / "tiny-mllm")


@pytest.mark.parametrize("kind", pods.KINDS)
def test_losses_are_those_of_two_local_ranks(kind: str, shards: Path, tmp_path: Path, local: list[float]) -> None:
    nodes = ended(two_nodes(manifest(kind, shards, tmp_path, "steps=3"), tmp_path))
    assert [code for code, _, _ in nodes] == [0, 0], nodes
    run = tmp_path / "tiny-mllm"
    assert runs.losses(run) == pytest.approx(local, abs=1e-5, rel=0) and len(local) == 3
    (begun,) = runs.events(run, "start")
    assert begun["ranks"] == 2
    begin, end = map(json.loads, (run / "slurm" / "attempts.jsonl").read_text().splitlines())
    assert (begin["step"], begin["nodes"], end["decision"]) == (0, 2, "done")


def test_sigterm_of_one_pod_saves_on_all_and_the_next_attempt_resumes(
    shards: Path, tmp_path: Path, local: list[float]
) -> None:
    """As at an eviction: only the evicted pod gets the signal. Both end with the code that is started again."""
    documents = manifest("jobset", shards, tmp_path, "steps=100000")
    nodes = two_nodes(documents, tmp_path)
    run = tmp_path / "tiny-mllm"
    runs.wait_for_steps(run, 2)
    nodes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(nodes)] == [STOPPED, STOPPED]
    done = runs.steps(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:08}").is_dir()
    documents[0]["data"]["recipe.yaml"] = documents[0]["data"]["recipe.yaml"].replace(
        "steps: 100000", f"steps: {done + 1}"
    )
    assert [code for code, _, _ in ended(two_nodes(documents, tmp_path))] == [0, 0]
    assert [line["step"] for line in runs.steps(run)] == list(range(1, done + 2))
    assert runs.losses(run)[:2] == pytest.approx(local[:2], abs=1e-5, rel=0)


def test_bad_input_is_exit_code_2_on_both(shards: Path, tmp_path: Path) -> None:
    """Another code on any node would start the run again."""
    nodes = ended(two_nodes(manifest("jobset", shards, tmp_path, f"data.shards={tmp_path}/none-*.tar"), tmp_path))
    assert [code for code, _, _ in nodes] == [USAGE, USAGE], nodes
    assert "none-*.tar" in nodes[0][2] and "Traceback" not in nodes[0][2] + nodes[1][2]
    assert json.loads((tmp_path / "tiny-mllm" / "stopped.json").read_text())["code"] == USAGE


def test_a_killed_rank_is_started_again_with_the_operators_own_code(shards: Path, tmp_path: Path) -> None:
    """The training operator takes codes below 128 for permanent failures, and Bifrost's are below."""
    nodes = two_nodes(manifest("pytorchjob", shards, tmp_path, "steps=100000"), tmp_path)
    runs.wait_for_steps(tmp_path / "tiny-mllm", 1)
    (rank,) = runs.children(nodes[1].pid)
    subprocess.run(["kill", "-9", str(rank)], check=True)
    (code, _, _), (other, _, errors) = ended(nodes)
    assert code == other == 138 and "rank 1 was ended by SIGKILL" in errors
