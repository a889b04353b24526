"""The commands on shards behind HTTP and S3 servers: transient faults have no effect, permanent ones are one line."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import time
from pathlib import Path

import fsspec
import pytest

import faulty_server
import object_store
import ranked
import runs
import small_model
from bifrost.data import ingest, open_dataset, retry
from bifrost.slurm.rank_env import free_port
from bifrost.trainer.cli import main
from faulty_server import Plan, Rule

SHARDS = "train-{00000..00003}.tar"


@pytest.fixture(scope="module")
def s3():
    with object_store.serving() as address:
        yield address


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch):
    """Short pauses, of hundredths of a second, but the usual number of them, and only the test's credentials."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.01)))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _forget_clients()
    yield
    _forget_clients()


def _forget_clients() -> None:
    for protocol in ("http", "s3"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


class Left(BaseException):
    """Raised instead of ending the process."""


@pytest.fixture
def bifrost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command in this process: exit code, standard output, and lines on standard error."""

    pid, exit = os.getpid(), os._exit

    def leave(code: int) -> None:
        if os.getpid() != pid:  # in a worker of the command
            exit(code)
        raise Left(code)

    def call(*words: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(main.os, "_exit", leave)
        monkeypatch.setattr(sys, "argv", ["bifrost", *map(str, words)])
        with pytest.raises((Left, SystemExit)) as left:
            main.main()
        out, err = capsys.readouterr()
        return left.value.args[0], out, err.splitlines()

    return call


def copied(folder: Path, to: Path, pattern: str = "*") -> Path:
    to.mkdir()
    for file in folder.glob(pattern):
        shutil.copy(file, to)
    return to


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("train-*")}


def failing(pattern: str) -> list[Rule]:
    """Two faults of each kind on every shard, for reads of the first bytes and of parts."""
    return [
        Rule(fault, f"train-0000{shard}.{pattern}", 2) for shard in range(4) for fault in ("503", "cut", "ignore-range")
    ]


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_faults_have_no_effect(protocol, request, shards, tmp_path, bifrost, monkeypatch) -> None:
    plan = Plan()
    source: Path | str = shards
    if protocol == "s3":  # where the indexes are written
        source = request.getfixturevalue("s3")
        object_store.fill(source, "bucket", shards, "*.tar")
    with faulty_server.serving(source, plan) as (address, _):
        spec = f"{address}/{SHARDS}"
        if protocol == "s3":
            spec = f"s3://bucket/{SHARDS}"
            for name, value in object_store.environment(address).items():
                monkeypatch.setenv(name, value)
            plan.rules += failing("(tar|index)")
            code, out, err = bifrost("data", "index", spec)
            assert code == 0 and "4 shards indexed: 60 samples, 60 of them with a caption" in out, err
            fs = fsspec.filesystem("s3")
            for file in shards.glob("*.index.jsonl"):
                assert fs.cat_file(f"bucket/{file.name}") == file.read_bytes()
        else:
            code, _, err = bifrost("data", "index", spec)
            assert code == 2 and "an index cannot be written over HTTP" in err[-1]
            plan.rules += failing("tar")
            own = ("--index-dir", tmp_path / "own", spec)
            code, out, err = bifrost("data", "index", *own)
            assert code == 0 and "4 shards indexed: 60 samples, 60 of them with a caption" in out, err
            code, out, err = bifrost("data", "verify", *own)
            assert code == 0 and "4 shards checked, 0 with problems" in out, err

        plan.rules += failing("tar") + failing("index")
        code, out, err = bifrost("data", "verify", spec)
        assert code == 0 and "4 shards checked, 0 with problems" in out, err

        plan.rules += failing("tar")
        for place, to in ((spec, "served"), (str(shards), "local")):
            options = ("--samples-per-shard", 25, "--processes", 1)
            code, out, err = bifrost("data", "ingest", place, tmp_path / to, *options)
            assert code == 0 and "60 samples in 3 shards, none set aside" in out, err
        assert contents(tmp_path / "served") == contents(tmp_path / "local") and contents(tmp_path / "local")
        assert open_dataset(spec).fingerprint == open_dataset(f"{shards}/{SHARDS}").fingerprint
    assert not any(rule.times for rule in plan.rules) and plan.fired["cut"] >= 16


COMMANDS = (("data", "index"), ("data", "verify"), ("data", "stats"), ("data", "ingest"))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no credentials", "Unable to locate credentials; set or renew the client's credentials"),
        ("403 s3", "check the permissions, or your credentials"),
        ("403 http", "check the permissions, or your credentials"),
        ("no bucket", "; check the "),
    ],
)
def test_permanent_errors_are_one_line(case, said, s3, shards, tmp_path, bifrost, monkeypatch) -> None:
    plan = Plan([Rule("403", "train", math.inf)] if case.startswith("403") else [])
    object_store.fill(s3, "bucket", shards)
    with faulty_server.serving(shards if case == "403 http" else s3, plan) as (address, _):
        for name, value in object_store.environment(address).items():
            if case != "no credentials" or "KEY" not in name:
                monkeypatch.setenv(name, value)
        bucket = "nowhere" if case == "no bucket" else "bucket"
        spec = f"{address}/{SHARDS}" if case == "403 http" else f"s3://{bucket}/{SHARDS}"
        for command in COMMANDS:
            out = {"ingest": [tmp_path / "out"], "index": ["--index-dir", tmp_path / "own"]}.get(command[1], [])
            code, _, err = bifrost(*command, spec, *out)
            (line,) = [line for line in err if line.startswith("error: ")]
            assert code == 2 and err[-1] == line and said in line and "train-0000" in line, (command, err)
            assert spec.partition("{")[0] in line
    assert not list(tmp_path.glob("o*/*"))


def test_endpoint_that_stays_down_is_data_lost(tmp_path, bifrost, monkeypatch) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    for name, value in object_store.environment(address).items():
        monkeypatch.setenv(name, value)
    for spec in (f"{address}/train-00000.tar", "s3://bucket/train-00000.tar"):
        for command in COMMANDS:
            out = {"ingest": [tmp_path / "out"], "index": ["--index-dir", tmp_path / "own"]}.get(command[1], [])
            code, _, err = bifrost(*command, spec, *out)
            assert code == 74 and "another attempt may succeed" in err[-1], (command, err)
            assert spec.rpartition("/")[0] in err[-1], "the shard, or the catalogue of its folder"


def test_server_that_stops_during_an_ingest(shards, tmp_path, bifrost, monkeypatch) -> None:
    """Images are neither set aside nor lost: the same command resumes."""
    plan, rules, agree = Plan(), [], ingest._agree

    def listed(*arguments) -> None:
        agree(*arguments)
        plan.rules = list(rules)

    monkeypatch.setattr(retry, "PATIENCE_S", 0.2)
    monkeypatch.setattr(ingest, "_agree", listed)
    with faulty_server.serving(shards, plan) as (address, _):
        words = ("data", "ingest", f"{address}/{SHARDS}", tmp_path / "out", "--samples-per-shard", 15)
        for fault, code in (("503", 74), ("403", 2)):
            plan.rules, rules = [], [Rule(fault, "train-00002.tar", math.inf)]
            found, _, err = bifrost(*words, "--processes", 1)
            assert found == code and "train-00002.tar: " in err[-1], err
            assert (tmp_path / "out" / "train-00000.tar").exists(), "the listing was done"
            assert not (tmp_path / "out" / "rejected.jsonl").exists()
        plan.rules, rules = [], []
        found, out, err = bifrost(*words, "--processes", 1)
        assert found == 0 and "60 samples in 4 shards, none set aside" in out, err


def train(environment: dict[str, str], arguments: list[str], patience_s: float) -> None:
    from bifrost.data import retry

    os.environ.update(environment)
    retry.PATIENCE_S = patience_s
    retry._sleep = lambda seconds: time.sleep(min(seconds, 0.01))
    ranked.command(arguments)


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_train_on_failing_servers(s3, shards, tmp_path) -> None:
    """The result is bitwise equal to that of local shards; a permanent error ends both ranks with one line."""
    settings = ["steps=3", *small_model.settings(tmp_path / "backbone")]

    def trained(spec: str, name: str, environment: dict[str, str], patience_s: float = 10) -> list[ranked.Rank]:
        arguments = runs.arguments(shards, tmp_path / name, *settings, f"data.shards={spec}")
        return ranked.run(train, 2, environment, arguments, patience_s)

    def end(name: str) -> tuple:
        run = tmp_path / name / "tiny-mllm"
        (last,) = (run / "checkpoints").iterdir()
        lines = [{key: line[key] for key in ("step", "loss", "grad_norm", "data_digest")} for line in runs.steps(run)]
        return lines, [(last / f"rank-0000{rank}.safetensors").read_bytes() for rank in range(2)]

    assert [rank.code for rank in trained(f"{shards}/{SHARDS}", "local", {})] == [0, 0]
    object_store.fill(s3, "bucket", shards)
    for source, name in ((shards, "http"), (s3, "s3")):
        plan = Plan(failing("(tar|index)"))
        with faulty_server.serving(source, plan) as (address, _):
            spec = f"s3://bucket/{SHARDS}" if name == "s3" else f"{address}/{SHARDS}"
            environment = object_store.environment(address)
            ended = trained(spec, name, environment)
            assert [rank.code for rank in ended] == [0, 0], ended[0].err
            assert end(name) == end("local") and sum(plan.fired.values()) > 10
            if name == "s3":
                ended = trained(f"s3://nowhere/{SHARDS}", "nowhere", environment)
                assert [rank.code for rank in ended] == [2, 2]
                assert "error: s3://nowhere/train-0000" in ended[0].err and not ended[1].err
    ended = trained(f"s3://bucket/{SHARDS}", "down", environment, 0.2)
    assert [rank.code for rank in ended] == [74, 74]
    assert "another attempt may succeed" in ended[0].err.splitlines()[-1]
