"""A whole run on an object store that fails at random, from the images to the copied checkpoints: bit for bit that of
local files."""

import json
import os
import shutil
from pathlib import Path

import boto3
import pytest

import faulty_server
import object_store
import ranked
import runs
from bifrost.data import open_dataset

SETTINGS = ("checkpoint.every=2", "data.workers=1")
EXACT = ("step", "loss", "grad_norm", "data_digest", "samples")


def bifrost(environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(environment)
    ranked.command(arguments)


def save_images(shards: Path, folder: Path) -> Path:
    folder.mkdir()
    dataset = open_dataset(f"{shards}/train-*.tar")
    for index in range(len(dataset)):
        sample = dataset.read(*dataset.place(index))
        (folder / f"{sample.key}.png").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(sample.caption)
    return folder


def checkpoint(home: Path) -> tuple[bytes, dict]:
    """The file of tensors of step 4, and the state next to it without the settings, which name the run's addresses."""
    folder = home / "checkpoints" / "step-00000004"
    assert {file.name for file in folder.iterdir()} == {"manifest.json", "rank-00000.safetensors", "state.json"}
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]
    return (folder / "rank-00000.safetensors").read_bytes(), state


@pytest.mark.multi
@pytest.mark.slow
def test_a_whole_run_on_s3_under_faults_equals_the_local_one(shards: Path, tmp_path: Path) -> None:
    images = save_images(shards, tmp_path / "images")
    faults = faulty_server.Plan(chance=0.1, faults=("503", "500", "reset", "slow", "cut", "short-206"))
    with object_store.serving() as moto, faulty_server.serving(moto, faults) as (address, plan):
        object_store.fill(moto, "bucket", tmp_path / "nothing")

        def run(*arguments: object) -> None:
            (ended,) = ranked.run(bifrost, 1, object_store.environment(address), [str(each) for each in arguments])
            assert ended.code == 0, ended.err

        def train(data: str, home: str, steps: int, *more: str) -> None:
            data = f"data.shards={data}/train-*.tar"
            run(*runs.arguments(shards, tmp_path / home, f"steps={steps}", *SETTINGS, *more, data))

        options = ("--samples-per-shard", 16, "--processes", 1)
        run("data", "ingest", images, tmp_path / "set", *options)
        train(f"{tmp_path}/set", "local", 4)

        plan.fired.clear()
        run("data", "ingest", images, "s3://bucket/set", *options)
        run("data", "index", "s3://bucket/set", "--index-dir", "s3://bucket/indexes")
        on_s3 = ("data.index_dir=s3://bucket/indexes", "checkpoint.upload=s3://bucket/runs")
        train("s3://bucket/set", "here", 2, *on_s3)
        shutil.rmtree(tmp_path / "here")
        run("checkpoint", "download", "s3://bucket/runs/tiny-mllm", tmp_path / "there/tiny-mllm")
        train("s3://bucket/set", "there", 4, *on_s3)
        run("checkpoint", "download", "s3://bucket/runs/tiny-mllm", tmp_path / "back/tiny-mllm")
        assert len(plan.fired) > 4 and plan.fired.total() > 10

        store = boto3.client(
            "s3", endpoint_url=moto, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
        )
        for name in ("train-00000.tar", "train-00003.tar", "train-00003.index.jsonl"):
            there = store.get_object(Bucket="bucket", Key=f"set/{name}")["Body"].read()
            assert there == (tmp_path / "set" / name).read_bytes()
        names = {each["Key"] for each in store.list_objects_v2(Bucket="bucket", Prefix="indexes/")["Contents"]}
        assert names == {f"indexes/s3/bucket/set/train-{number:05d}.index.jsonl" for number in range(4)}

    homes = [tmp_path / home / "tiny-mllm" for home in ("local", "there", "back")]
    local, there, back = ([{key: line[key] for key in EXACT} for line in runs.steps(home)] for home in homes)
    assert local == there == back and len(local) == 4
    local, there, back = map(checkpoint, homes)
    assert local == there == back
