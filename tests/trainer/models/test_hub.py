"""Hub models are requested by one rank per node, once per process; transient errors are retried.

The hub is a server on loopback, the client the real huggingface_hub.
"""

import hashlib
import math
import os
import re
import sys
import time
import types
from collections import Counter

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import hub_server
from bifrost.data import DataLost, retry
from bifrost.recipes import load_recipe
from bifrost.slurm.rank_env import free_port
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import hub as model_hub
from bifrost.trainer.training import inputs
from faulty_server import Rule

FILES = {
    "config.json": b'{"model_type": "qwen2_5_vl"}',
    "model.safetensors": bytes(range(256)) * 40,
    "notes.md": b"not asked for",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The plan of a hub that has the models owner/name and owner/gated."""
    with hub_server.hub({"owner/name": FILES, "owner/gated": FILES}, gated="owner/gated") as (address, plan):
        use(monkeypatch, address, tmp_path)
        yield plan


def use(monkeypatch, address, tmp_path):
    """Set what HF_ENDPOINT=address, HF_HUB_OFFLINE=0 and HF_HUB_CACHE set when the client is imported. No pauses."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", quick)
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    monkeypatch.setattr(model_hub, "_snapshots", {})


def held(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


WANTED = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items() if name != "notes.md"}


@pytest.mark.parametrize("fault", ["503", "429", "500", "reset", "cut", "cut-unstated"])
@pytest.mark.parametrize("path", ["/revision/", "/tree/", "config.json", "model.safetensors"])
def test_transient_errors_are_retried_and_the_bytes_are_right(hub, fault, path):
    hub.rules.append(Rule(fault, path, times=2))
    assert held(model_hub.locate("owner/name")) == WANTED
    assert hub.fired[fault] == 2


def test_a_model_is_requested_once_per_process(hub):
    model_hub.locate("owner/name", hub_server.COMMIT)
    asked = len(hub.asked)
    model_hub.locate("owner/name", hub_server.COMMIT)
    assert len(hub.asked) == asked
    model_hub.locate("owner/name", "main")
    assert len(hub.asked) > asked


@pytest.mark.parametrize("fault", ["503", "429", "reset", "cut", "cut-unstated"])
@pytest.mark.parametrize("path", ["/revision/", "model.safetensors"])
def test_an_unavailable_hub_is_retryable(hub, fault, path):
    hub.rules.append(Rule(fault, path, math.inf))
    with pytest.raises(DataLost, match=r"^backbone\.path=owner/name: .*; check the storage") as caught:
        model_hub.locate("owner/name")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_retryable(monkeypatch, tmp_path):
    use(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(DataLost, match=r"^backbone\.path=owner/name: .*; check the storage or the network"):
        model_hub.locate("owner/name")


def test_a_missing_model_is_refused(hub):
    with pytest.raises(RunError, match=r"^backbone\.path=owner/none: .*404.*; give a local folder") as caught:
        model_hub.locate("owner/none")
    assert "\n" not in str(caught.value) and not caught.value.transient
    assert max(Counter(hub.asked).values()) == 1, "asked again"


@pytest.mark.parametrize("revision", ["66285546", "f" * 40])
def test_a_revision_of_another_model_is_refused_with_the_remedy(hub, revision):
    """As when only `backbone.path` of a recipe with a revision is overridden."""
    for setting in ("backbone", "flux"):
        with pytest.raises(RunError) as caught:
            model_hub.locate("owner/name", revision, f"{setting}.path")
        assert str(caught.value) == (
            f"{setting}.path=owner/name: {setting}.revision={revision} does not exist there; set {setting}.revision="
            "null, or to a commit of this model"
        )
        assert not caught.value.transient


@pytest.mark.parametrize("status", ["401", "403", "gated"])
def test_a_gated_model_is_refused_with_the_remedy(hub, status):
    if status != "gated":
        hub.rules.append(Rule(status, times=math.inf))
    name = "owner/gated" if status == "gated" else "owner/name"
    with pytest.raises(
        RunError, match=rf"^backbone\.path={name}: .*accept its licence on the hub, and set HF_TOKEN$"
    ) as caught:
        model_hub.locate(name)
    assert "\n" not in str(caught.value) and max(Counter(hub.asked).values()) == 1


@pytest.mark.parametrize(("fault", "code"), [("503", 74), ("401", 2), ("404", 2)])
def test_the_command_ends_with_the_code_of_its_error(hub, monkeypatch, capsys, fault, code):
    hub.rules.append(Rule(fault, times=math.inf))
    monkeypatch.setattr(sys, "argv", ["bifrost", "train", "tiny-mllm", "--dry-run", "backbone.path=owner/name"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert len(re.findall("^error: .*backbone.path=owner/name: .*$", capsys.readouterr().err, re.M)) == 1


@pytest.mark.parametrize("local", [0, 1])
def test_one_rank_per_node_queries_the_hub(hub, monkeypatch, shards, local):
    order, only_cache = [], []
    download = huggingface_hub.snapshot_download

    def seen(path, **options):
        only_cache.append(options["local_files_only"])
        return download(path, **options)

    model_hub.locate("owner/name")
    monkeypatch.setattr(model_hub, "_snapshots", {})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", seen)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    recipe = load_recipe("tiny-mllm", [f"data.shards={shards}/train-*.tar", "global_batch=4", "micro_batch=2"])

    def gather(value):
        order.append("gather")
        return [value]

    before = len(hub.asked)

    def stage():
        order.append(model_hub.locate("owner/name"))
        return types.SimpleNamespace(bucket_rule=None)

    inputs.open_inputs(recipe.data, recipe.seed, recipe.global_batch, stage, gather=gather)
    assert set(only_cache) == {local > 0}
    if local:
        assert len(hub.asked) == before
        assert order.index("gather") < len(order) - 1 and order[-1] != "gather", "after the first rank"
