"""Exported folders are sent to a hub and fetched from it, whole, also after an interruption.

The hub is a server on loopback with the LFS protocol, the client the real huggingface_hub without its Xet protocol.
"""

import hashlib
import shutil
import subprocess
import types
from pathlib import Path

import pytest
from huggingface_hub import constants, lfs
from huggingface_hub.utils import _http

import hub_server
from bifrost.data import DataLost, retry
from bifrost.trainer.checkpoint.sums import write_sums
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import hub as model_hub
from faulty_server import Rule

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# a card\n",
    "model_index.json": b"{}",
    "mllm/model.safetensors": bytes(range(256)) * 400,
    "controlnet/diffusion_pytorch_model.safetensors": bytes(range(255, -1, -1)) * 500,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_sums(folder, left_out=["README.md"])
    return folder


@pytest.fixture
def written() -> hub_server.Written:
    return hub_server.Written()


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What HF_HUB_DISABLE_XET=1, HF_TOKEN and HF_HUB_CACHE set when the client is imported. No pauses."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    monkeypatch.setattr(model_hub, "_snapshots", {})
    quick = types.SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", quick)


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def bifrost(*words: object) -> None:
    assert not main.app(["hub", *map(str, words)], standalone_mode=False)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_folder_is_the_same_after_push_and_pull(folder, written, tmp_path, monkeypatch, capsys) -> None:
    with hub_server.writable(written) as (address, _):
        use(monkeypatch, address)
        bifrost("push", folder, "some/model")
        assert capsys.readouterr().out == f"some/model: {address}/some/model/commit/{hub_server.COMMIT}\n"
        assert written.private == {"some/model": True}
        bifrost("push", folder, "some/other", "--public")
        assert written.private["some/other"] is False and "some/other: " in capsys.readouterr().out
    assert written.models["some/model"] == contents(folder)
    with hub_server.hub(written.models) as (address, _):
        use(monkeypatch, address)
        bifrost("pull", "some/model", tmp_path / "out")
        assert capsys.readouterr().out == f"{tmp_path / 'out'}: fetched and verified\n"
    assert contents(tmp_path / "out") == contents(folder)
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True)
    assert checked.returncode == 0


def test_an_interrupted_push_sends_only_what_is_missing(folder, written, monkeypatch) -> None:
    """The process ends after one of the two large files; the next one sends the other."""
    before, begun = lfs.lfs_upload, []

    def once(*arguments, **options):
        begun.append(1)
        if len(begun) > 1:
            raise KeyboardInterrupt
        before(*arguments, **options)

    with hub_server.writable(written) as (address, _):
        use(monkeypatch, address)
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub._commit_api.lfs_upload", once)
            assert main.app(["hub", "push", str(folder), "some/model"], standalone_mode=False) == 130, "as by Ctrl-C"
        assert len(written.puts) == 1 and not written.models["some/model"]
        bifrost("push", folder, "some/model")
        assert sorted(written.puts) == sorted(hashlib.sha256(d).hexdigest() for n, d in FILES.items() if "/" in n)
        assert written.models["some/model"] == contents(folder)
        bifrost("push", folder, "some/model")
        assert len(written.puts) == 2, "nothing is sent twice"


@pytest.mark.parametrize("path", ["repos/create", "preupload", "objects/batch", "blob", "/commit/"])
def test_a_busy_hub_is_asked_again(folder, written, monkeypatch, path) -> None:
    with hub_server.writable(written) as (address, plan):
        use(monkeypatch, address)
        plan.rules.append(Rule("503", path, times=1))
        bifrost("push", folder, "some/model")
        assert plan.fired["503"] == 1
    assert written.models["some/model"] == contents(folder)


def test_an_interrupted_pull_continues(folder, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with hub_server.hub({"some/model": contents(folder)}) as (address, plan):
        use(monkeypatch, address)
        plan.rules.append(Rule("503", "mllm/model.safetensors", times=1000))
        with pytest.raises(DataLost, match=r"^some/model: "):
            bifrost("pull", "some/model", out)
        plan.rules.clear()
        asked = len(plan.asked)
        bifrost("pull", "some/model", out)
        again = [path for method, path, _ in plan.asked[asked:] if method == "GET" and "/resolve/" in path]
    assert contents(out) == contents(folder)
    assert [path for path in again if path.endswith("mllm/model.safetensors")]
    assert not [path for path in again if path.endswith("controlnet/diffusion_pytorch_model.safetensors")]


def test_what_is_refused_is_one_line(folder, written, tmp_path, monkeypatch) -> None:
    def refused(message: str, *words: object) -> None:
        with pytest.raises(RunError, match=message) as caught:
            bifrost(*words)
        assert "\n" not in str(caught.value)

    out = tmp_path / "out"
    refused(r"^name: not a hub id \(owner/name\)", "push", folder, "name")
    refused(r"^name: not a hub id \(owner/name\)", "pull", "name", out)
    refused(
        r"^\S+nothing: has no README\.md; give a folder that `bifrost export` wrote", "push", out / "nothing", "a/b"
    )
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "mllm" / "model.safetensors").write_bytes(b"damaged")
    refused(r"its SHA-256 is not that in SHA256SUMS", "push", damaged, "some/model")
    with hub_server.writable(written, forbidden="not/mine") as (address, _):
        use(monkeypatch, address)
        refused(
            "^not/mine: may not be written .*set HF_TOKEN to a token that may write there", "push", folder, "not/mine"
        )
    assert written.models == {}
    refused("export: is not empty, choose a new folder", "pull", "some/model", folder)
    stored = {**contents(folder), "mllm/model.safetensors": b"damaged"}
    with hub_server.hub({"some/model": stored, "gated/model": stored}, gated="gated/model") as (address, _):
        use(monkeypatch, address)
        refused(r"^no/model: cannot be downloaded .*; check its name$", "pull", "no/model", out)
        none = r"^some/model: has no revision v9; set --revision to main, or to a commit of this model$"
        refused(none, "pull", "some/model", out, "--revision", "v9")
        refused("gated/model: may not be read, or does not exist", "pull", "gated/model", out)
        refused(r"mllm/model\.safetensors: its SHA-256 is not that in SHA256SUMS", "pull", "some/model", out)
