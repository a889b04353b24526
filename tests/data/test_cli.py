from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from bifrost.data import DataError, write_shard
from bifrost.trainer.cli.main import data_app as app


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


def test_stats_count_every_caption(tmp_path, make_image):
    """Also where KEY.txt is missing; the counts are those of the texts written here."""
    texts = [
        {"txt": "a long caption", "short.txt": "long"},
        {"short.txt": "a"},
        {"txt": "é", "shrot.txt": "wrong", "json": "{}"},
    ]
    for shard in range(2):
        samples = []
        for number, members in enumerate(texts):
            content = {kind: text.encode() for kind, text in members.items()}
            samples.append((f"k{number}", {"png": make_image(number), "jpg": make_image(number), **content}))
        write_shard(tmp_path / f"all-{shard:05d}.tar", samples)
    printed = [line.split() for line in call("stats", tmp_path / "all-*.tar").replace("│", " ").splitlines()]
    for row in (
        ["KEY.short.txt", "4", "1", "to", "4", "2.5"],
        ["KEY.txt", "4", "2", "to", "14", "8.0"],
        ["KEY.shrot.txt", "2", "5", "to", "5", "5.0"],
        ["KEY.json", "2", "2", "to", "2", "2.0"],
    ):
        assert row in printed
    members = [line[0] for line in printed if line and line[0].startswith("KEY.")]
    assert members[0] == "KEY.png" and members[1:3] == ["KEY.short.txt", "KEY.txt"]

    none = [(f"k{number}", {"png": make_image(number), "short.txt": b"abc"}) for number in range(3)]
    write_shard(tmp_path / "none-00000.tar", none)
    printed = call("stats", tmp_path / "none-*.tar")
    assert "none in KEY.txt" in printed and "KEY.short.txt" in printed


def test_stats_shorten_a_long_list(tmp_path, make_image):
    samples = [("k", {"png": make_image(0), "txt": b"a", **{f"{i:02d}.txt": b"b" for i in range(30)}})]
    write_shard(tmp_path / "s-00000.tar", samples)
    printed = call("stats", tmp_path / "s-*.tar")
    assert printed.count("KEY.") == 20 and "and 11 rarer extensions" in printed
