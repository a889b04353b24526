"""Runs of stage 2 without a ControlNet: the samples and noise of one with it, read by generate, refused elsewhere."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import opened
import plain
import runs
import tiny_flux
from bifrost.recipes import Recipe, RecipeError, load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError

BRIDGES = {
    "queries": ("controlnet.bridge=queries", "controlnet.connector={queries: 5, layers: 2}"),
    "cross_attention": ("controlnet.bridge=cross_attention",),
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


def arguments(shards: Path, flux: Path, runs_dir: Path, *settings: str) -> list[str]:
    whole = (*runs.TINY, f"flux.path={flux}", "steps=1", *settings)
    return runs.arguments(shards, runs_dir, *whole, recipe="tiny-controlnet")


def batch(recipe: Recipe) -> dict[str, torch.Tensor]:
    (first,) = plain.batches(recipe, opened.inputs(recipe))
    return first.arrays


@pytest.mark.parametrize("kind", BRIDGES)
def test_samples_text_and_noise_are_those_of_a_controlnet(kind: str, shards: Path, flux: Path, tmp_path: Path) -> None:
    one, other = (
        batch(load_recipe("tiny-controlnet", arguments(shards, flux, tmp_path, *settings)[2:]))
        for settings in ((), BRIDGES[kind])
    )
    assert one.keys() == other.keys() and {"noise", "level", "posterior", "images", "t5"} <= one.keys()
    assert one.pop("truncated") == other.pop("truncated") == 0
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("kind", BRIDGES)
def test_generate_reads_the_run_and_export_does_not(kind: str, shards: Path, flux: Path, tmp_path: Path) -> None:
    import ranked

    for words in (
        arguments(shards, flux, tmp_path, *BRIDGES[kind]),
        runs.arguments(shards, tmp_path, *runs.TINY, "steps=1"),
    ):
        (ended,) = ranked.bifrost(1, *words)
        assert ended.code == 0, ended.err
    made = []
    for name, prompt in (("one", "a red apple"), ("other", "moon")):
        words = ["generate", "--mllm", str(tmp_path / "tiny-mllm"), "--controlnet", str(tmp_path / "tiny-controlnet")]
        words += ["--out", str(tmp_path / name), "--flux-steps=2", "--steps=4", "--empty-prompt", prompt]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        image, *_ = sorted((tmp_path / name).glob("[0-9]*.png"))
        made.append(Image.open(image).tobytes())
    assert made[0] != made[1], "FLUX's text is empty: only the latents differ"
    for layout in ("public", "hf"):
        with pytest.raises(RunError, match=f"controlnet.bridge is {kind}, which a `flux_controlnet` folder"):
            export(tmp_path / "tiny-controlnet", tmp_path / "out", layout)
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, tmp_path, "steps=2"))
    assert ended.code == 2 and f"controlnet.bridge was {chr(34)}{kind}{chr(34)} in this run" in ended.err
    (ended,) = ranked.bifrost(1, *arguments(shards, flux, tmp_path, *BRIDGES[kind], "name=b", f"init_from={flux}"))
    assert ended.code == 2 and f"only a run folder has the weights of controlnet.bridge={kind}" in ended.err
    (ended,) = ranked.bifrost(
        1, *arguments(shards, flux, tmp_path, *BRIDGES[kind], "name=b", f"init_from={tmp_path / 'tiny-controlnet'}")
    )
    assert ended.code == 0, ended.err


def test_a_connector_without_queries_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"controlnet.connector has no effect with controlnet.bridge=cross_attention"):
        load_recipe("tiny-controlnet", [*BRIDGES["cross_attention"], "controlnet.connector.layers=2"])
