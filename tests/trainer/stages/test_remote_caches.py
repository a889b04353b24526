"""Caches of shards on S3, in an object store or in `data.index_dir`: the same bytes as those of local shards."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
import s3fs

import faulty_server
import object_store
import runs
import tiny_flux
from bifrost.data import index_shards
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.stages import open_stage
from bifrost.trainer.stages.precompute import encode
from faulty_server import Plan, Rule

pytestmark = pytest.mark.usefixtures("one_thread")
SHARDS = "train-{00000..00001}.tar"


def files(folder: Path) -> dict[str, bytes]:
    """Those of the only cache below a folder."""
    (cache,) = folder.rglob("cache-vae-*")
    return {f"{cache.name}/{file.name}": file.read_bytes() for file in cache.iterdir()}


def objects(store, prefix: str) -> dict[str, bytes]:
    listed = store.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}cache-")["Contents"]
    keys = [each["Key"] for each in listed]
    return {key.removeprefix(prefix): store.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize("place", ["next to the shards", "local", "s3"])
def test_equal_to_a_local_cache(shards: Path, tmp_path: Path, monkeypatch, place: str) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    index_dir = {"local": f"{tmp_path}/own", "s3": "s3://bucket/own"}.get(place)

    def recipe(data: str, *more: str) -> Recipe:
        settings = (f"flux.path={flux}", "micro_batch=4", "flux.placement.vae=cached", f"data.shards={data}", *more)
        name, *overrides = runs.arguments(shards, tmp_path, *settings, recipe="tiny-controlnet")[1:]
        return load_recipe(name, overrides)

    def encoded(one: Recipe) -> None:
        encode(open_stage(one).outputs(), one.data, None, one.micro_batch)

    own = f"{tmp_path}/reference"
    index_shards(f"{shards}/{SHARDS}", index_dir=own)
    encoded(recipe(f"{shards}/{SHARDS}", f"data.index_dir={own}"))
    expected = files(Path(own))
    assert len(expected) == 1 + 2 * 3

    plan = Plan()
    with object_store.serving() as moto, faulty_server.serving(moto, plan) as (address, _):
        object_store.fill(moto, "bucket", shards, "*" if index_dir is None else "*.tar")
        for name, value in object_store.environment(address).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = boto3.client(
            "s3", endpoint_url=moto, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
        )
        remote = recipe(f"s3://bucket/{SHARDS}", *([f"data.index_dir={index_dir}"] if index_dir else []))
        if index_dir:
            index_shards(f"s3://bucket/{SHARDS}", index_dir=index_dir)
        plan.rules += [Rule("503", r"cache-vae.*00000\.tar", 2), Rule("reset", r"cache-vae.*jsonl", 1)]
        encoded(remote)
        assert plan.fired.total() == (0 if place == "local" else 3)
        if place == "local":
            assert files(tmp_path / "own") == expected
        else:
            assert objects(store, "own/s3/bucket/" if index_dir else "") == expected
        here, there = (
            open_stage(one).open_caches()["vae"]
            for one in (remote, recipe(f"{shards}/{SHARDS}", f"data.index_dir={own}"))
        )
        wanted, found = (each.read((1, 3), "pattern-018") for each in (there, here))
        assert wanted.keys() == found.keys() and all(wanted[name].equal(found[name]) for name in wanted)
        s3fs.S3FileSystem.clear_instance_cache()
