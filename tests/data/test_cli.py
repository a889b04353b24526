from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from bifrost.data import DataError
from bifrost.data.cli import app


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, DataError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_index_verify_and_stats(make_shards, tmp_path):
    make_shards([3, 4])
    shards = tmp_path / "s-*.tar"
    os.unlink(tmp_path / "s-00000.index.jsonl")
    assert "s-00000.tar: unindexed" in call("verify", shards, code=1)
    with pytest.raises(DataError, match="no index next to it"):
        call("stats", shards)
    assert "1 shard indexed: 3 samples, 3 of them with a caption" in call("index", "--only-missing", shards)
    assert "2 shards checked, 0 with problems" in call("verify", shards)
    printed = call("stats", tmp_path / "s-{00000..00001}.tar")
    for value in ("3 to 4", "9 to 9 characters, mean 9.0", "samples"):
        assert value in printed


def test_ingest(tmp_path, make_image):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes(make_image(number))
        (source / f"{number}.txt").write_text("x" if number else "")
    printed = call("ingest", source, tmp_path / "out", "--samples-per-shard", 2, "--processes", 1)
    assert "2 samples in 2 shards, 1 set aside in" in printed


def test_errors_pass_through(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        call("ingest", tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match=r"no \.tar matches"):
        call("verify", tmp_path / "*.tar")
