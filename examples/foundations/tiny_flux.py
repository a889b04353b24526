"""Train the demo's tiny FLUX on scenes, one stage per command, in this order.

    python examples/foundations/tiny_flux.py vae WORK
    python examples/foundations/tiny_flux.py text WORK
    python examples/foundations/tiny_flux.py flux WORK
    python examples/foundations/tiny_flux.py guidance WORK
    python examples/foundations/tiny_flux.py export WORK --out recipes/foundations/tiny-flux
    python examples/foundations/tiny_flux.py report WORK --out recipes/foundations/tiny-flux

WORK is a folder for the results of the stages. `flux` and `guidance` save every few minutes and resume from there.
Equal seeds, steps and thread counts give equal weights.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_data import flux_scenes, pack, sprite_scenes, to_depth, to_images
from flux_model import NOISE_SHIFT, build_transformer
from flux_probes import Probe, report
from flux_text import Encoders, build_encoders, make_sprites, train_encoders
from flux_training import GuidanceDistillation, Pool, Training, flow_matching, run
from flux_vae import build_vae, encode, round_trip, train_vae

from bifrost.data.scenes.heldout import heldout_scenes, training_scenes

STEPS = {"vae": 150, "text": 900, "flux": 3200, "guidance": 200}
SCENES = 8000
CHECKPOINT, DISTILLED = "flux.pt", "guidance.pt"
GUIDANCE_LEARNING_RATE = 3e-4


def vae_stage(work: Path, steps: int, seed: int) -> None:
    images = to_images(flux_scenes(2000, seed))
    vae = build_vae(to_depth(images))
    train_vae(vae, images, steps, seed)
    vae.save_pretrained(work / "vae")
    heldout = to_images(heldout_scenes(20, seed))
    print(f"round trip: train {round_trip(vae, images):.2f} dB, held out {round_trip(vae, heldout):.2f} dB")


def load_vae(work: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / "vae").eval()


def text_stage(work: Path, steps: int, seed: int) -> None:
    vae, alone = load_vae(work), sprite_scenes()
    blank = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    sprites = make_sprites(alone, pack(encode(vae, to_images(alone))), pack(encode(vae, blank)))
    scenes = training_scenes(SCENES, seed) + flux_scenes(SCENES, seed)
    encoders = build_encoders([scene.caption for scene in scenes])
    train_encoders(encoders, sprites, scenes, steps, seed)
    # Rounded before FLUX is trained on their states, so that it is trained with the shipped weights.
    for model in (encoders.clip, encoders.t5):
        model.to(torch.bfloat16).float()
    encoders.save(work)


def make_pool(work: Path, seed: int) -> Pool:
    vae, scenes = load_vae(work), flux_scenes(SCENES, seed)
    return Pool(Encoders.load(work), scenes, pack(encode(vae, to_images(scenes))))


def flux_stage(work: Path, steps: int, seed: int) -> None:
    training = Training(build_transformer(), seed)
    if (work / CHECKPOINT).exists():
        training.restore(work / CHECKPOINT)
    pool = make_pool(work, seed)
    run(training, pool, flow_matching, steps, work / CHECKPOINT, Probe(work, load_vae(work), pool), 500)


def guidance_stage(work: Path, steps: int, seed: int) -> None:
    teacher = build_transformer()
    teacher.load_state_dict(torch.load(work / CHECKPOINT)["average"])
    teacher.requires_grad_(False).eval()
    student = build_transformer()
    student.load_state_dict(teacher.state_dict())
    training = Training(student, seed + 1, learning_rate=GUIDANCE_LEARNING_RATE)
    if (work / DISTILLED).exists():
        training.restore(work / DISTILLED)
    pool = make_pool(work, seed)
    probe = Probe(work, load_vae(work), pool, guidance=3.5)
    run(training, pool, GuidanceDistillation(teacher), steps, work / DISTILLED, probe, 200)


def export(work: Path, out: Path) -> None:
    """Save the stages' results as a FLUX folder in the layout of diffusers: bf16, the VAE in fp32."""
    source = work / (DISTILLED if (work / DISTILLED).exists() else CHECKPOINT)
    transformer, encoders = build_transformer(), Encoders.load(work)
    transformer.load_state_dict(torch.load(source)["average"])
    encoders.forget_calls()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=math.log(NOISE_SHIFT), max_shift=math.log(NOISE_SHIFT)
        ),
        vae=load_vae(work),
        text_encoder=encoders.clip.to(torch.bfloat16),
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5.to(torch.bfloat16),
        tokenizer_2=encoders.t5_tokenizer,
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(out)
    config = json.loads((out / "vae/config.json").read_text())
    config.pop("_name_or_path", None)  # WORK
    (out / "vae/config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STEPS, "export", "report"])
    parser.add_argument("work", type=Path, help="folder for the results of the stages")
    parser.add_argument("--out", type=Path, help="export, report: the FLUX folder")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if arguments.stage == "export":
        export(arguments.work, arguments.out)
        return
    if arguments.stage == "report":
        report(arguments.out)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    stages = {"vae": vae_stage, "text": text_stage, "flux": flux_stage, "guidance": guidance_stage}
    steps = arguments.steps or STEPS[arguments.stage]
    stages[arguments.stage](arguments.work, steps, arguments.seed)


if __name__ == "__main__":
    main()
