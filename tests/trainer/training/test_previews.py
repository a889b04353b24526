"""Stage 1's previews: the image generator is on rank 0's device only during a preview, and in the plan."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.recipes.schema import Previews
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.latent_decoder import LatentDecoder
from bifrost.trainer.models.flux import FluxFolder
from bifrost.trainer.models.latent_controlnet import ControlNetConfig, LatentControlNet, write_config
from bifrost.trainer.planner import parts, plan, workload
from bifrost.trainer.planner.previews import image_generator_bytes
from bifrost.trainer.training import preview

WIDTH, SIDE = 6, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Previews:
    place = tmp_path_factory.mktemp("image_generator")
    flux = FluxFolder.open(tiny_flux.save(tiny_flux.pipeline(), place / "flux"))
    network = LatentControlNet(ControlNetConfig.of(flux.transformer, WIDTH, SIDE, 2 * SIDE, 1, 1))
    network.initialise(flux.files("transformer"), "flux", 0)
    write_config(place / "controlnet", network.shape)
    save_file(network.state_dict(), place / "controlnet" / "diffusion_pytorch_model.safetensors")
    return Previews(every=1, controlnet=str(place / "controlnet"), flux=str(place / "flux"))


def test_flux_is_loaded_for_a_preview_and_freed(settings: Previews, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref] = []

    def load(*arguments: Any) -> Any:
        assert not [one for one in loaded if one() is not None], "one at a time"
        found = real(*arguments)
        loaded.append(weakref.ref(found))
        return found

    real = preview.load_flux
    monkeypatch.setattr(preview, "load_flux", load)
    image_generator = preview._ImageGenerator(settings, WIDTH, SIDE, CPU)
    assert not loaded, "FLUX is not in memory before the first preview"
    nothing: Any = None
    decoder = LatentDecoder(nothing, nothing, 112, CPU)
    draw = torch.Generator().manual_seed(0)
    for count in (1, 2):
        alone, _ = image_generator.buckets(112)
        samples = [preview._Sample("a red apple", alone, [], None)]
        images = image_generator.generate(decoder, samples, [torch.randn(SIDE**2, WIDTH, generator=draw)])
        assert [image.size for image in images] == [(64, 64)]
        gc.collect()
        assert len(loaded) == count and all(one() is None for one in loaded)


def test_incomplete_weights_are_refused_before_the_run_begins(settings: Previews, tmp_path: Path) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path)
    save_file({"x": torch.zeros(1)}, flux / "text_encoder" / "model.safetensors")
    with pytest.raises(RunError, match=r"text_encoder: .* missing"):
        preview._ImageGenerator(settings.model_copy(update={"flux": str(flux)}), WIDTH, SIDE, CPU)


@pytest.mark.parametrize("missing", ["/nowhere", "here"])
def test_the_plan_counts_them(settings: Previews, missing: str) -> None:
    controlnet = f"previews.controlnet={settings.controlnet if missing == 'here' else missing}"
    own = [f"previews.flux={settings.flux}"] if missing == "here" else []
    recipe = load_recipe("tiny-mllm", ["previews.every=100", controlnet, *own])
    found = image_generator_bytes(recipe.previews)
    if missing == "here":
        files = [
            *Path(str(settings.controlnet)).glob("*.safetensors"),
            *Path(str(settings.flux)).glob("*/*.safetensors"),
        ]
        assert found == pytest.approx(sum(file.stat().st_size for file in files) / 2, rel=0.1), "fp32 there, bf16 here"
    else:
        # FLUX.1-dev, T5, CLIP and the VAE, and a ControlNet of 4 double and 1 single blocks: spec 7.1.
        assert found == pytest.approx(2 * (11.901e9 + 4.762e9 + 0.123e9 + 0.0838e9 + 1.771e9), rel=0.01)
    without, counted = (plan(parts(recipe), workload(recipe), 2, previews=bytes_) for bytes_ in (0.0, found))
    assert counted.memory.peak == max(without.memory.peak, without.memory.static + found)
    assert image_generator_bytes(load_recipe("tiny-mllm").previews) == 0
    assert image_generator_bytes(load_recipe("tiny-controlnet", ["previews.every=5"]).previews) == 0
