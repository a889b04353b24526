"""`bifrost bench data`: all baselines do the same work, and the record contains what was measured."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bifrost.data import DataError, bench, open_dataset
from bifrost.data.photos import make_photos
from bifrost.data.remote import fetch
from bifrost.data.remote_file import RemoteFile
from bifrost.data.transforms import decode_sizes
from bifrost.trainer.bench import data, range_server
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images in 4 shards, with shorter sides of 64 to 160 px."""
    return make_photos(tmp_path_factory.mktemp("photos"), 24, 4, (64, 160))


def job(spec: str, workers: int = 2) -> bench.Job:
    return bench.Job(open_dataset(spec), bench.stack, (56,), micro_batch=4, workers=workers)


def test_generated_images_are_those_that_were_asked_for(photos: str, tmp_path: Path) -> None:
    dataset = open_dataset(photos)
    assert dataset.samples_per_shard.tolist() == [6, 6, 6, 6]
    files = [dataset.read(shard, number).image for shard in range(4) for number in range(6)]
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert {image.format for image in images} == {"JPEG"}
    assert all(64 <= min(image.size) <= 160 for image in images) and len({image.size for image in images}) > 12
    assert len(set(files)) == 24
    bits = [8 * len(file) / (image.width * image.height) for file, image in zip(files, images, strict=True)]
    assert 1 < np.mean(bits) < 5, "about as many bits a pixel as a photo has"
    assert open_dataset(make_photos(tmp_path, 24, 4, (64, 160))).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("own_decoder", [False, True])
def test_baselines_make_the_same_batches(photos: str, own_decoder: bool) -> None:
    work = job(photos)
    ours, theirs = {}, {}
    for found, batches in ((ours, bench.reader_batches(work)), (theirs, bench.webdataset_batches(work, own_decoder))):
        for batch in islice(batches, 4 * 6):  # endless ones need some epochs of six until all have come
            assert batch["images"].shape == (4, 3, 56, 56) and batch["images"].dtype == torch.uint8
            found.update(zip(batch["captions"], batch["images"], strict=True))
    assert ours.keys() == theirs.keys() and len(ours) == 24
    off = [(ours[caption].int() - theirs[caption].int()).abs().float().mean() for caption in ours]
    assert max(off) == 0 if own_decoder else max(off) < 6, (
        max(off),
        "one decodes in full, the other to the needed size",
    )


def test_pillow_alone_computes_what_the_reader_does(photos: str) -> None:
    for stored in job(photos).images:
        alone, ours = bench.pil_alone(stored, (56, 28)), decode_sizes(stored, (56, 28))
        assert [image.shape for image in alone] == [(56, 56, 3), (28, 28, 3)]
        # Not at the border, where Pillow's box sees what was cut off.
        inner = [(a[4:-4, 4:-4].astype(int), b[4:-4, 4:-4]) for a, b in zip(alone, ours, strict=True)]
        assert all(np.abs(a - b).max() <= 1 for a, b in inner)


def test_processes_share_the_work_and_a_dead_one_is_an_error() -> None:
    seconds, results = bench.in_processes(lambda number: number * number, 20, 3)
    assert seconds > 0 and sorted(results) == [number * number for number in range(20)]
    with pytest.raises(DataError, match="died"):
        bench.in_processes(lambda number: 1 // (number - 3), 5, 2)


def test_a_rate_leaves_out_the_warm_up(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)

    def batches():
        nonlocal now
        for number in range(work.warm + 2 * work.batches):
            now += 100 if number < work.warm else 2  # a slow start
            yield {"captions": ["a"] * 3 if number % 2 else ["a"] * 5}

    work = job(photos, workers=1)
    assert (work.warm, work.batches) == (3, 3), "an epoch of six without the warm-up"
    assert bench.rate(work, batches) == (pytest.approx((3 + 5 + 3) / 3 / 2), 100)
    assert job(photos).batches == 3, "half an epoch, where the warm-up takes all of it"


def test_only_the_first_shards_that_are_needed(photos: str) -> None:
    assert [len(bench.first_shards(photos, *wanted)) for wanted in ((6, 1), (7, 1), (1, 3), (1000, 1))] == [
        6,
        12,
        18,
        24,
    ]


@pytest.mark.multi
def test_the_command_reports_ratios_of_its_rounds(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "usable_readers", lambda http: ([], []))
    arguments = ["bench", "data", photos, "--workers", "2", "--rounds", "2", "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ended.exit_code == 0
    record = json.loads((tmp_path / "out" / "data.json").read_text())
    reader = record["rates"]["our reader"]
    for name, over in record["reader_over"].items():
        ratios = [a / b for a, b in zip(reader, record["rates"][name], strict=True)]
        assert over == pytest.approx(sum(ratios) / 2) and len(ratios) == 2
        assert name in ended.output and f"{over:.2f}" in ended.output
    assert record["shorter_side"][0] >= 64 and record["shorter_side"][2] <= 160
    whole = 2 / np.median(reader)
    assert sum(record["seconds_per_sample"].values()) == pytest.approx(whole)


def test_a_recipe_brings_its_sizes_and_collate(shards: Path) -> None:
    settings = [f"data.shards={shards}/train-*.tar", "global_batch=8", "micro_batch=4", "data.shuffle_window=2"]
    with data._job("tiny-mllm", settings, samples=20, workers=1, sides="") as work:
        assert (work.sizes, work.micro_batch, work.block, len(work.dataset.shards)) == ((112,), 4, 2, 2)
        ours, theirs = (next(iter(baseline(work))) for baseline in (bench.reader_batches, bench.webdataset_batches))
    assert ours.keys() == theirs.keys() >= {"images", "input_ids", "mask"}
    assert ours["images"].shape == theirs["images"].shape == (4, 3, 112, 112)


def test_a_folder_of_shards_is_no_recipe(photos: str) -> None:
    folder = str(Path(photos).parent)
    with data._job(folder, [], samples=17, workers=2, sides="") as work:
        assert len(work.dataset.shards) == 3
    ended = CliRunner().invoke(app, ["bench", "data", folder, "data.workers=3"])
    assert "overrides need a recipe" in str(ended.exception)


def test_mistakes_are_one_line(photos: str) -> None:
    with pytest.raises(DataError, match="5 workers"):
        job(photos, workers=5)
    with pytest.raises(DataError, match=r"fewer samples \(24\) than a micro-batch of 25"):
        bench.Job(open_dataset(photos), bench.stack, (56,), micro_batch=25, workers=1)
    ended = CliRunner().invoke(app, ["bench", "data", photos, "data.workers=3"])
    assert "overrides need a recipe" in str(ended.exception)
    ended = CliRunner().invoke(app, ["bench", "data", "--sides", "9,3"])
    assert "--sides 9,3" in str(ended.exception)


def test_over_http_the_samples_are_those_of_the_files(photos: str) -> None:
    """From a server that answers late; both read the URLs."""
    work = job(photos, workers=1)
    shards = open_dataset(photos).shards
    with range_server.served(shards, 0.001) as urls:
        work.urls = urls
        assert work.measured.shards == urls != shards
        ours, theirs = (
            dict(zip(batch["captions"], batch["images"], strict=True))
            for batches in (bench.reader_batches(work), bench.webdataset_batches(work, own_decoder=True))
            for batch in islice(batches, 1)
        )
    assert ours.keys() <= set(local := captions(photos)) and theirs.keys() <= set(local)
    for batch in (ours, theirs):
        assert all(torch.equal(image, local[caption]) for caption, image in batch.items())


def captions(spec: str) -> dict[str, torch.Tensor]:
    work = job(spec, workers=1)
    batches = islice(bench.reader_batches(work), 6)
    return {
        caption: image for batch in batches for caption, image in zip(batch["captions"], batch["images"], strict=True)
    }


def test_the_server_sends_ranges_late(photos: str) -> None:
    shards = open_dataset(photos).shards
    content = Path(shards[1]).read_bytes()
    with range_server.served(shards, 0.2) as urls:
        begun = time.monotonic()
        assert RemoteFile(urls[1]).read(1000, 500) == content[1000:1500]
        assert time.monotonic() - begun >= 0.2
        assert fetch(urls[1], len(content) - 5, 9).body == content[-5:]
        assert urllib.request.urlopen(urls[1]).read() == content
        with pytest.raises(FileNotFoundError):
            fetch(urls[0].replace("00000", "00009"), 0, 5)


def test_latencies() -> None:
    assert [range_server.latency_seconds(text) for text in ("30ms", "0.1s", "0", "1.5 ms")] == [0.03, 0.1, 0, 0.0015]
    for text in ("30", "fast", "-1ms"):
        with pytest.raises(RunError, match=f"--latency {text}: give a time with its unit, such as 30ms"):
            range_server.latency_seconds(text)
    with pytest.raises(RunError, match=r"http://h/a\.tar: --latency serves local shards"):
        data._check_servable(["http://h/a.tar"])
