"""The pipeline generates what `bifrost generate` does from the same runs; its arguments are those of diffusers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifrost import BifrostPipeline
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.export_pipeline import export_pipeline
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"steps": 4, "num_inference_steps": 2}
FRESH = """
import sys
import torch
torch.set_num_threads(1)
from bifrost import BifrostPipeline
pipe = BifrostPipeline.from_pretrained(sys.argv[1])
pipe("a red  apple", steps=4, num_inference_steps=2, seed=5).images[0].save("ours.png")
from diffusers import DiffusionPipeline
for name in ("folder", "pipeline"):
    how = sys.argv[1] if name == "folder" else name
    other = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=how, trust_remote_code=True)
    other("a red  apple", steps=4, num_inference_steps=2, seed=5).images[0].save(f"{name}.png")
print(*({"deepspeed", "mlflow", "webdataset", "pandas", "matplotlib", "typer", "pyarrow"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def folder(place: Path, mllm: Path, controlnet: Path) -> Path:
    assert export_pipeline(mllm, controlnet, place / "pipeline") == (7, 7)
    return place / "pipeline"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> BifrostPipeline:
    found = BifrostPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def test_a_fresh_process_gives_the_image_of_generate_to_the_bit(
    folder: Path, mllm: Path, controlnet: Path, tmp_path: Path
) -> None:
    """Also through DiffusionPipeline with the folder's own code; without the packages that only training needs."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", FRESH, str(folder)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1].strip() == ""
    runs = ["--mllm", str(mllm), "--controlnet", str(controlnet), "--out", str(tmp_path / "out")]
    few = ["--steps", "4", "--flux-steps", "2", "--seed", "5"]
    assert not main.app(["generate", *runs, *few, "a red  apple"], standalone_mode=False)
    wanted = np.asarray(Image.open(tmp_path / "out" / "00000-a-red-apple.png"))
    assert wanted.std() > 10
    for name in ("ours", "folder", "pipeline"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), wanted), name


def test_every_setting_of_generate_has_its_argument(pipe: BifrostPipeline, generator: Generator) -> None:
    arguments = {
        "schedule": "linear",
        "latent_guidance_scale": 2.0,
        "guidance_scale": 2.0,
        "true_cfg_scale": 1.5,
        "controlnet_conditioning_scale": 0.9,
    }
    found = pipe(["moon", "a red apple"], seed=3, num_images_per_prompt=2, **FEW, **arguments).images
    settings = Settings(4, "linear", 2.0, flux=Sampling(2, 2.0, 0.9, 1.5))
    wanted = generator.generate(["moon", "moon", "a red apple", "a red apple"], [3, 4, 3, 4], settings)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    latents = generator.latents(["moon"], [8])
    found = pipe("a red apple", seed=3, patch_latents=latents, **FEW).images[0]
    wanted = generator.generate(["a red apple"], [3], Settings(4, flux=Sampling(2)), latents)[0]
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_output_types_are_of_the_same_image(pipe: BifrostPipeline) -> None:
    made = {kind: pipe("moon", seed=1, output_type=kind, **FEW).images for kind in ("pil", "np", "pt", "latent")}
    pixels = np.asarray(made["pil"][0])
    assert made["np"].shape == (1, 64, 64, 3) and made["np"].dtype == np.float32
    assert np.array_equal((made["np"][0] * 255).round(), pixels)
    assert torch.equal(made["pt"], torch.from_numpy(made["np"]).permute(0, 3, 1, 2))
    decoded = pipe.vae.decode(made["latent"] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    decoded = torch.nn.functional.pixel_shuffle(decoded, 2).clamp(-1, 1)
    assert np.abs((decoded[0].permute(1, 2, 0) + 1).detach().numpy() * 127.5 - pixels).max() < 0.51
    (images,) = pipe("moon", seed=1, return_dict=False, **FEW)
    assert np.array_equal(np.asarray(images[0]), pixels)


def test_generators_are_diffusers_own(pipe: BifrostPipeline) -> None:
    def made(**arguments: object) -> np.ndarray:
        return pipe("moon", output_type="np", **FEW, **arguments).images

    one = torch.Generator().manual_seed(4)
    first, second = made(generator=one), made(generator=one)
    assert not np.array_equal(first, second), "a generator moves on"
    assert np.array_equal(made(generator=torch.Generator().manual_seed(4)), first)
    several = [torch.Generator().manual_seed(seed) for seed in (9, 4)]
    assert np.allclose(made(generator=several, num_images_per_prompt=2)[1], first[0], atol=1.01 / 255)
    torch.manual_seed(4)
    assert np.array_equal(made(), first), "without one it is torch's"


def test_a_callback_sees_and_changes_the_latents_and_ends_the_steps(pipe: BifrostPipeline) -> None:
    seen = []

    def watch(owner, step, timestep, tensors):
        assert owner is pipe and tensors.keys() == {"latents"}
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return tensors

    settings = {"seed": 1, "steps": 4, "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("moon", **settings).images
    watched = pipe("moon", callback_on_step_end=watch, **settings).images
    assert torch.equal(watched, plain)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1000
    assert seen[0][1] > seen[1][1] > seen[2][1] > 0
    unpacked = torch.nn.functional.pixel_shuffle(seen[-1][2].transpose(1, 2).unflatten(2, (8, 8)), 2)
    assert torch.equal(unpacked, plain)

    def zero(owner, step, timestep, tensors):
        return {"latents": 0 * tensors["latents"]} if step == 2 else None

    assert not pipe("moon", callback_on_step_end=zero, **settings).images.any()

    def stop(owner, step, timestep, tensors):
        owner._interrupt = step == 1

    ended = pipe("moon", callback_on_step_end=stop, **settings).images
    unpacked = torch.nn.functional.pixel_shuffle(seen[1][2].transpose(1, 2).unflatten(2, (8, 8)), 2)
    assert torch.equal(ended, unpacked)
    assert torch.equal(pipe("moon", **settings).images, plain), "an interruption is of one call"


def test_wrong_arguments_are_one_line(pipe: BifrostPipeline) -> None:
    for arguments, message in (
        ({"prompt": []}, "^prompt: give a string"),
        ({"prompt": ["moon", 3]}, "^prompt: give a string"),
        ({"steps": 17}, "^17 decoding steps for 16 patches"),
        ({"num_inference_steps": 0}, "^0 FLUX steps"),
        ({"output_type": "jpg"}, "^output_type='jpg': give pil, np, pt or latent"),
        ({"num_images_per_prompt": 0}, "^num_images_per_prompt=0"),
        ({"prompt": None}, "^prompt: give a string"),
        ({"steps": 1.5}, "^1.5 decoding steps: set a whole number"),
        ({"num_inference_steps": "4"}, "^'4' FLUX steps: set a whole number"),
        ({"num_images_per_prompt": 1.5}, "^num_images_per_prompt=1.5"),
        ({"seed": -1}, "^seed=-1: give a whole number from 0"),
        ({"seed": [1, 2]}, r"^seed=\[1, 2\]: give a whole number"),
        ({"generator": 3}, "^generator: give a torch.Generator"),
        ({"schedule": "cosin"}, "^schedule 'cosin': give cosine or linear"),
        ({"guidance_scale": math.nan}, "^FLUX guidance scale nan: give a finite number"),
        ({"true_cfg_scale": None}, "^guidance of FLUX's text None: give a finite number"),
        ({"controlnet_conditioning_scale": [0.7]}, r"^conditioning scale \[0.7\]: give a finite number"),
        ({"latent_guidance_scale": math.inf}, "^guidance of the latents inf: give a finite number"),
        ({"temperature": -1}, "^temperature -1: give 0 or more"),
        ({"callback_on_step_end": 3}, "^callback_on_step_end: give a function"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "^callback_on_step_end: returned other than"),
        ({"seed": 1, "generator": torch.Generator()}, "^give seed or generator"),
        ({"generator": [torch.Generator()] * 2}, "^2 generators for 1 images"),
        ({"temperature": 0.5}, "head is linear"),
        ({"patch_latents": torch.zeros(2, 16, 192)}, r"^patch_latents: of shape \[2, 16, 192\]; give \[1, 16, 192\]"),
        ({"patch_latents": [1]}, r"^patch_latents: is of type list; give a tensor of \[1, 16, 192\]"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "'prompt_embeds' is unknown"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            pipe(**{"prompt": "moon", **FEW, **arguments})
        assert "\n" not in str(caught.value)


def test_precision_and_device(folder: Path, pipe: BifrostPipeline) -> None:
    half = BifrostPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    parts = [half.mllm, half.controlnet, half.transformer, half.vae, half.text_encoder, half.text_encoder_2]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.controlnet.buffers() if b.is_floating_point()} == {torch.float32}
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())
    assert not any(module.training for part in parts for module in part.modules())
    assert half.to("cpu") is half and half.to("cpu", torch.bfloat16) is half
    tables = half.mllm.model.branch.rotary_embedding, half.mllm.model.backbone.text.rotary_emb
    assert {table.inv_freq.dtype for table in tables} == {torch.float32}
    assert {b.dtype for b in half.controlnet.buffers() if b.is_floating_point()} == {torch.float32}
    with pytest.raises(RunError, match=r"^the pipeline is torch\.bfloat16: load it with .*dtype=torch\.float32"):
        half.to(torch.float32)
    again = BifrostPipeline(**pipe.components, flux=pipe.config.flux)
    assert again.transformer is pipe.transformer and again.mllm is pipe.mllm


def test_parts_can_be_replaced(folder: Path, pipe: BifrostPipeline) -> None:
    class Silent(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, latents):
            return type("Decoded", (), {"sample": torch.zeros(len(latents), 12, 32, 32)})

    given = BifrostPipeline.from_pretrained(folder, transformer=pipe.transformer)
    assert given.transformer is pipe.transformer and given.vae is not pipe.vae
    given.vae = Silent()
    assert set(np.asarray(given("moon", **FEW).images[0]).flatten()) == {128}


def test_offload_moves_one_part_at_a_time(folder: Path, pipe: BifrostPipeline) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is an optional package")
    wanted = pipe("moon", seed=1, output_type="np", **FEW).images
    offloaded = BifrostPipeline.from_pretrained(folder)
    offloaded.enable_model_cpu_offload(device="cpu")
    order, before = [], hooks.CpuOffload.pre_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hooks.CpuOffload,
            "pre_forward",
            lambda hook, module, *a, **k: order.append(module) or before(hook, module, *a, **k),
        )
        found = offloaded("moon", seed=1, output_type="np", **FEW).images
    parts = {module: name for name, module in offloaded.components.items()}
    steps = ["controlnet", "transformer"] * 2
    assert [parts[module] for module in order] == ["mllm", "text_encoder_2", "text_encoder", *steps, "vae"]
    assert np.array_equal(found, wanted)
    with pytest.raises(RunError, match=r"enable_model_cpu_offload\(\) instead"):
        offloaded.enable_sequential_cpu_offload()


def test_the_index_is_what_diffusers_reads(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "BifrostPipeline" and index["_diffusers_version"]
    assert BifrostPipeline.load_config(folder)["flux"] == index["flux"]
