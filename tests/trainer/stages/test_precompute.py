"""`bifrost data encode`: the cache replaces the frozen parts, and is refused for any others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import plain
import ranked
import runs
import tiny_flux
from bifrost.data import DataError, verify
from bifrost.data.make_catalogue import make_catalogues
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.stages import open_stage
from bifrost.trainer.stages import precompute as module
from bifrost.trainer.stages.precompute import encode

CACHED = ("flux.placement.vae=cached", "flux.placement.text=cached")
EVERY = (*CACHED, "flux.placement.vision_encoder=cached")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture
def data(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


def settings(data: Path, flux: Path, *more: str) -> list[str]:
    """Arguments after the verb."""
    whole = (f"flux.path={flux}", "micro_batch=4", "optimizer.lr=3e-3", "steps=3", *more)
    return runs.arguments(data, data.parent / "runs", *whole, recipe="tiny-controlnet")[1:]


def recipe(data: Path, flux: Path, *more: str) -> Recipe:
    name, *overrides = settings(data, flux, *more)
    return load_recipe(name, overrides)


def encoded(recipe: Recipe) -> None:
    encode(open_stage(recipe).outputs(), recipe.data, recipe.validation.shards, recipe.micro_batch)


def folder(data: Path, kind: str = "vae") -> Path:
    (found,) = data.glob(f"cache-{kind}-*")
    return found


def refusal(recipe: Recipe) -> str:
    with pytest.raises((RunError, DataError)) as error:
        open_stage(recipe).open_caches()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.multi
@pytest.mark.slow
def test_ranks_encode_and_train_from_it_as_without(data: Path, flux: Path) -> None:
    originals = {file.name: file.read_bytes() for file in data.iterdir()}
    ended = ranked.bifrost(2, "data", "encode", *settings(data, flux, *EVERY))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert [rank.out.count("30 samples in 2 shards") for rank in ended] == [3, 3], "of each kind"
    assert [rank.out.count(" to encode, ") for rank in ended] == [3, 0]
    assert {file.name: file.read_bytes() for file in data.iterdir() if file.is_file()} == originals
    for kind in ("vae", "text", "vision"):
        assert verify(f"{folder(data, kind)}/train-*.tar") == []

    wanted = plain.losses(recipe(data, flux))
    np.testing.assert_allclose(plain.losses(recipe(data, flux, *EVERY)), wanted, rtol=1e-6)
    ended = ranked.bifrost(2, "train", *settings(data, flux, *EVERY, "data.workers=1"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    np.testing.assert_allclose(runs.losses(data.parent / "runs" / "tiny-controlnet"), wanted, rtol=1e-5)

    other = tiny_flux.save(tiny_flux.pipeline(seed=1), data.parent / "other")
    (ended,) = ranked.bifrost(1, "train", *settings(data, other, *CACHED, "name=second"))
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("error: flux.placement.vae=cached:") and "vae weights" in line
    assert not (data.parent / "runs" / "second").exists()


def test_what_is_cached_is_not_loaded(data: Path, flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(recipe(data, flux, CACHED[0]))
    stage = open_stage(recipe(data, flux, CACHED[0], EVERY[2]))
    model = stage.build()
    stage.load(model)
    assert model.flux.vae is None and model.flux.text_encoder is not None and not hasattr(model, "backbone")
    assert stage.image_sizes == (112,), "images at FLUX's size are not even decoded"
    make_catalogues(f"{data}/train-*.tar")
    monkeypatch.setattr("bifrost.data.index.load_header", lambda shard, *_: pytest.fail(f"{shard} was opened"))
    assert open_stage(recipe(data, flux, CACHED[0])).open_caches().keys() == {"vae"}


def test_resumes_after_an_interruption_and_repairs_damaged_shards(
    data: Path, flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wanted = recipe(data, flux, CACHED[0])
    assert "is missing" in refusal(wanted)
    whole = module.write_shard

    def interrupted(path: Path, samples):
        if path.name == "train-00002.tar":
            next(samples)
            raise KeyboardInterrupt
        return whole(path, samples)

    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded(wanted)
    assert "2 of 4 shards" in refusal(wanted)
    (folder(data) / "train-00002.tar.tmp-1").write_bytes(b"of a killed process")
    monkeypatch.setattr(module, "write_shard", whole)
    encoded(wanted)
    assert "30 samples in 2 shards, 2 shards already there" in capsys.readouterr().out
    made = {file.name: file.read_bytes() for file in folder(data).iterdir()}
    assert len(made) == 1 + 4 * 3, "made.json, and of each shard tar, index and lines"

    tar = folder(data) / "train-00001.tar"
    content = bytearray(tar.read_bytes())
    place = json.loads((folder(data) / "train-00001.cache.jsonl").read_text().splitlines()[4])
    content[place[1] + place[2] - 1] ^= 1
    tar.write_bytes(content)
    cache = open_stage(wanted).open_caches()["vae"]
    assert cache.read((1, 0), "pattern-015").keys() == {"mean", "std"}
    with pytest.raises(DataError, match="damaged or incomplete at sample pattern-018"):
        cache.read((1, 3), "pattern-018")
    with pytest.raises(DataError, match="pattern-000"):
        cache.read((1, 0), "pattern-000")
    tar.write_bytes(content[:-512])
    assert "damaged (" in refusal(wanted)
    encoded(wanted)
    assert "15 samples in 1 shard, 3 shards already there" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder(data).iterdir()} == made, "the same bytes again"


def test_a_cache_of_other_weights_settings_or_shards_is_refused(data: Path, flux: Path) -> None:
    wanted = recipe(data, flux, *CACHED)
    encoded(wanted)
    assert "flux.image_size 64, here 32" in refusal(recipe(data, flux, CACHED[0], "flux.image_size=32"))
    assert "tokens [13, 9], here [7, 9]" in refusal(recipe(data, flux, CACHED[1], "flux.text_tokens=7"))
    assert "precision fp32, here bf16" in refusal(recipe(data, flux, CACHED[1], "precision=bf16"))
    other = tiny_flux.save(tiny_flux.pipeline(seed=1), data.parent / "other")
    assert "another vae weights" in refusal(recipe(data, other, CACHED[0]))
    assert "another text_encoder weights" in refusal(recipe(data, other, CACHED[1]))

    encoded(recipe(data, other, CACHED[0]))
    mine, theirs = sorted(data.glob("cache-vae-*"), key=lambda path: path.stat().st_ctime)
    shutil.rmtree(mine)
    theirs.rename(mine)
    assert "other weights or settings than its folder name states" in refusal(wanted)
    shutil.rmtree(mine)
    encoded(recipe(data, flux, CACHED[0]))
    for name in ("train-00000.tar", "train-00000.index.jsonl"):  # the samples of another shard
        shutil.copy(data / name.replace("0.", "1."), data / name)
    assert "made from another train-00000.tar (1 of 4" in refusal(wanted)


def test_unreadable_samples_are_left_out(shards: Path, data: Path, flux: Path, capsys) -> None:
    from bifrost.data import open_dataset, write_shard

    found = open_dataset(f"{shards}/train-00000.tar")
    samples = [found.read(0, number) for number in range(4)]
    images = [b"no image" if number == 1 else sample.image for number, sample in enumerate(samples)]
    for file in data.iterdir():
        file.unlink()
    pairs = [(s.key, {"png": image, "txt": s.caption.encode()}) for s, image in zip(samples, images, strict=True)]
    write_shard(data / "train-00000.tar", pairs)
    encoded(recipe(data, flux, CACHED[0]))
    assert "4 samples in 1 shard, 1 unreadable" in capsys.readouterr().out
    cache = open_stage(recipe(data, flux, CACHED[0])).open_caches()["vae"]
    assert cache.read((0, 2), "pattern-002")["mean"].shape == (4, 16, 16)
    with pytest.raises(DataError, match="pattern-001"):
        cache.read((0, 1), "pattern-001")
    one_epoch = ("global_batch=4", "steps=1")
    wanted = plain.losses(recipe(data, flux, *one_epoch))
    found = plain.losses(recipe(data, flux, *one_epoch, CACHED[0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg="a neighbour in its place has its own latents")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tiny-controlnet", r"flux\.placement\.vae, text or"), ("tiny-mllm", r"backbone\.vision_encoder=cached")],
)
def test_a_recipe_that_caches_nothing(name: str, hint: str) -> None:
    with pytest.raises(RunError, match=rf"^{name}: caches nothing; set {hint}"):
        CliRunner().invoke(app, ["data", "encode", name, "data.shards=none"], catch_exceptions=False)
