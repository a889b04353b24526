"""Previews during training: they are written, they show the trained weights, and they do not change the run."""

from pathlib import Path

import pytest
from PIL import Image

import ranked
import runs
import tiny_flux

pytestmark = [pytest.mark.multi, pytest.mark.slow]
SAMPLES = ("previews.every=2", "previews.count=2")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


def train(shards: Path, runs_dir: Path, recipe: str, *settings: str) -> Path:
    whole = ("steps=5", "ema.decay=0.9", "micro_batch=4", "data.image_size=112", *settings)
    ended = ranked.bifrost(2, *runs.arguments(shards, runs_dir, *whole, recipe=recipe))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return runs_dir / recipe


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "checkpoints/step-00000005").glob("*.safetensors"))}


def test_stage_2_is_undisturbed_to_the_bit(shards: Path, flux: Path, tmp_path: Path) -> None:
    settings = (f"flux.path={flux}",)
    calm = train(shards, tmp_path / "calm", "tiny-controlnet", *settings)
    seen = train(shards, tmp_path / "seen", "tiny-controlnet", *settings, *SAMPLES)
    assert runs.losses(seen) == runs.losses(calm)
    assert files(seen) == files(calm)
    assert [file.name for file in sorted((seen / "previews").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    first, second = (Image.open(file).convert("RGB") for file in sorted((seen / "previews").iterdir()))
    assert first.size == second.size and first.tobytes() != second.tobytes(), "training changes the previews"
    assert not (calm / "previews").exists()


def test_stage_1_is_undisturbed_to_the_bit(shards: Path, flux: Path, tmp_path: Path) -> None:
    controlnet = train(shards, tmp_path / "controlnet", "tiny-controlnet", f"flux.path={flux}")
    calm = train(shards, tmp_path / "calm", "tiny-mllm")
    seen = train(shards, tmp_path / "seen", "tiny-mllm", f"previews.controlnet={controlnet}", *SAMPLES)
    assert runs.losses(seen) == runs.losses(calm)
    assert files(seen) == files(calm)
    assert len(list((seen / "previews").iterdir())) == 2
    wrong = runs.arguments(shards, tmp_path / "wrong", f"previews.controlnet={calm}", *SAMPLES)
    (ended,) = ranked.bifrost(1, *wrong)
    assert ended.code == 2 and "is a patch-latents run, expected a controlnet run" in ended.err, ended.err
    assert not list((tmp_path / "wrong").rglob("metrics.jsonl")), "refused before the run began"


def test_stage_1_needs_a_controlnet(shards: Path, tmp_path: Path) -> None:
    (ended,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path, "previews.every=2"))
    assert ended.code == 2 and "previews.controlnet" in ended.err
