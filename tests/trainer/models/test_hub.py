"""Models of the hub: asked for by one rank per node, once per process; what may pass is asked again."""

import huggingface_hub
import pytest
import requests
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bifrost.data import DataLost, retry
from bifrost.recipes import load_recipe
from bifrost.trainer import inputs
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import backbone


class Response:
    headers = {}  # noqa: RUF012
    request = None

    def __init__(self, status):
        self.status_code = status


def wrapped(error):
    """As the hub's client raises it where its cache is empty."""
    outer = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    outer.__cause__ = error
    return outer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub's client: raises each error in turn, then answers; what it was asked."""
    asked, errors = [], []

    def snapshot_download(path, **options):
        asked.append((path, options["revision"], options["local_files_only"]))
        if errors:
            raise errors.pop(0)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(backbone, "_fetched", {})
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    return asked, errors


def test_what_may_pass_is_asked_again(hub, tmp_path):
    asked, errors = hub
    errors += [HfHubHTTPError("503", response=Response(503)), wrapped(requests.ConnectionError("refused"))]
    assert backbone.locate("owner/name", "abc") == tmp_path
    assert asked == [("owner/name", "abc", False)] * 3
    backbone.locate("owner/name", "abc")
    assert len(asked) == 3, "once per process"
    backbone.locate("owner/name", "def")
    assert asked[3] == ("owner/name", "def", False)


def test_a_hub_that_is_away_is_lost(hub):
    _, errors = hub
    errors += [wrapped(HfHubHTTPError("503 Service Unavailable", response=Response(503))) for _ in range(50)]
    with pytest.raises(DataLost, match=r"^backbone\.path=owner/name: 503 Service Unavailable; check the storage"):
        backbone.locate("owner/name")


def test_a_model_that_is_not_there_is_refused(hub):
    asked, errors = hub
    errors.append(RepositoryNotFoundError("404 Client Error", response=Response(404)))
    with pytest.raises(RunError, match=r"cannot be downloaded \(404 Client Error\); give a local folder") as caught:
        backbone.locate("owner/name")
    assert len(asked) == 1 and not caught.value.passing


@pytest.mark.parametrize("local", [0, 1])
def test_one_rank_of_each_node_asks_the_hub(hub, monkeypatch, shards, local):
    asked, _ = hub
    order = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(inputs, "open_stage", lambda recipe: order.append(backbone.locate("owner/name")))
    recipe = load_recipe("tiny-mllm", [f"data.shards={shards}/train-*.tar", "global_batch=4", "micro_batch=2"])

    def gather(value):
        order.append("gather")
        return [value]

    inputs.open_inputs(recipe, 2, gather=gather)
    assert {only_cache for _, _, only_cache in asked} == {local > 0}
    if local:
        assert order.index("gather") < len(order) - 1 and order[-1] != "gather", "after the first rank"


def test_a_revision_of_another_model_says_what_to_set(hub):
    """As with a recipe's own, when its `backbone.path` alone is overridden."""
    _, errors = hub
    for setting in ("backbone", "flux"):
        errors.append(RevisionNotFoundError("404 Client Error", response=Response(404)))
        with pytest.raises(RunError) as caught:
            backbone.locate("owner/name", "66285546", f"{setting}.path")
        assert str(caught.value) == (
            f"{setting}.path=owner/name: {setting}.revision=66285546 does not exist there; set {setting}.revision=null,"
            " or to a commit of this model"
        )
        assert not caught.value.passing


@pytest.mark.parametrize(
    "error", [GatedRepoError("gated", response=Response(403)), HfHubHTTPError("401", response=Response(401))]
)
def test_a_model_that_is_gated_says_what_to_do(hub, error):
    asked, errors = hub
    errors.append(wrapped(error))
    with pytest.raises(
        RunError, match=r"^backbone\.path=owner/name: .*accept its licence on the hub, and set HF_TOKEN$"
    ):
        backbone.locate("owner/name")
    assert len(asked) == 1
