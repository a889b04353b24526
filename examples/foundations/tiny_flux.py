"""Train the demo's tiny FLUX on the demo dataset, one stage per command, in this order.

    bifrost data demo demo
    python examples/foundations/tiny_flux.py vae demo WORK
    python examples/foundations/tiny_flux.py text demo WORK
    python examples/foundations/tiny_flux.py flux demo WORK
    python examples/foundations/tiny_flux.py guidance demo WORK
    python examples/foundations/tiny_flux.py export demo WORK --out recipes/foundations/tiny-flux
    python examples/foundations/tiny_flux.py report demo WORK --out recipes/foundations/tiny-flux

WORK is a folder for the results of the stages. `flux` and `guidance` save every few minutes and resume from there.
Equal seeds, steps and thread counts give equal weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_data import LATENT_SIDE, UNSEEN_PHRASE, Drawings, cells, pack, read_drawings, to_depth, unpack
from flux_model import build_transformer, sample
from flux_probes import load_tower, measures, sheet
from flux_text import Encoders, build_encoders, train_encoders
from flux_training import FlowMatching, GuidanceDistillation, Table, Training, encode_texts, make_table, run
from flux_vae import build_vae, decode, encode, round_trip, train_vae
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

STEPS = {"vae": 900, "text": 3500, "flux": 3800, "guidance": 200}
PROBED = 64
CHECKPOINT, DISTILLED = "flux.pt", "guidance.pt"
GUIDANCE_LEARNING_RATE = 3e-4


def vae_stage(work: Path, train: Drawings, heldout: Drawings, steps: int, seed: int) -> None:
    vae = build_vae(to_depth(train.images))
    train_vae(vae, train.images, steps, seed)
    vae.save_pretrained(work / "vae")
    print(
        f"round trip: train {round_trip(vae, train.images):.2f} dB, held out {round_trip(vae, heldout.images):.2f} dB"
    )


def text_stage(work: Path, train: Drawings, heldout: Drawings, steps: int, seed: int) -> None:
    vae = load_vae(work)
    encoders = build_encoders(train.captions)
    heads = train_encoders(encoders, pack(encode(vae, train.images)), train.captions, steps, seed)
    # Rounded before FLUX is trained on their states, so that it is trained with the shipped weights.
    for model in (encoders.clip, encoders.t5):
        model.to(torch.bfloat16).float()
    encoders.save(work)
    with torch.no_grad():
        for name, part, phrase in (
            ("train", train, "{}"),
            ("reworded", train, UNSEEN_PHRASE),
            ("held out", heldout, "{}"),
        ):
            states = encode_texts(encoders, [phrase.format(caption) for caption in part.captions]).states
            error = F.mse_loss(heads.cells(states), cells(pack(encode(vae, part.images))))
            print(f"cells {name}: {error.item():.4f}")


def load_vae(work: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / "vae").eval()


class Probe:
    """Generates the first PROBED training captions from text alone, measures them and draws a sheet."""

    def __init__(
        self,
        work: Path,
        train: Drawings,
        vae: AutoencoderKL,
        encoders: Encoders,
        table: Table,
        **options: float,
    ) -> None:
        self.options = options
        self.work, self.train, self.vae, self.table = work, train, vae, table
        self.tower = load_tower()
        self.text = table.text.rows(torch.arange(PROBED))
        self.unseen = encode_texts(encoders, [UNSEEN_PHRASE.format(caption) for caption in train.captions[:PROBED]])

    def generate(self, model: torch.nn.Module, **options: float) -> torch.Tensor:
        text = self.unseen if options.pop("unseen", False) else self.text
        return decode(self.vae, unpack(sample(model, text, self.table.empty, **options)))  # type: ignore[arg-type]

    def __call__(self, training: Training) -> None:
        found = self.generate(training.average, **self.options)
        print(json.dumps({"step": training.step, **measures(self.tower, found, self.train.images)}), flush=True)
        sheet(self.work / "sheet.png", self.train.captions[:PROBED], found, self.train.images[:PROBED])


def flux_stage(work: Path, train: Drawings, heldout: Drawings, steps: int, seed: int) -> None:
    vae, encoders = load_vae(work), Encoders.load(work)
    table = make_table(encoders, pack(encode(vae, train.images)), train.captions, seed)
    training = Training(build_transformer(), seed)
    if (work / CHECKPOINT).exists():
        training.restore(work / CHECKPOINT)
    run(training, FlowMatching(table), steps, work / CHECKPOINT, Probe(work, train, vae, encoders, table), 500)


def guidance_stage(work: Path, train: Drawings, heldout: Drawings, steps: int, seed: int) -> None:
    vae, encoders = load_vae(work), Encoders.load(work)
    table = make_table(encoders, pack(encode(vae, train.images)), train.captions, seed)
    teacher = build_transformer()
    teacher.load_state_dict(torch.load(work / CHECKPOINT)["average"])
    teacher.requires_grad_(False).eval()
    student = build_transformer()
    student.load_state_dict(teacher.state_dict())
    training = Training(student, seed + 1, learning_rate=GUIDANCE_LEARNING_RATE)
    if (work / DISTILLED).exists():
        training.restore(work / DISTILLED)
    probe = Probe(work, train, vae, encoders, table, guidance=3.5)
    run(training, GuidanceDistillation(table, teacher), steps, work / DISTILLED, probe, 200)


def export(work: Path, out: Path) -> None:
    """Save the stages' results as a FLUX folder in the layout of diffusers: bf16, the VAE in fp32."""
    source = work / (DISTILLED if (work / DISTILLED).exists() else CHECKPOINT)
    transformer, encoders = build_transformer(), Encoders.load(work)
    transformer.load_state_dict(torch.load(source)["average"])
    encoders.forget_calls()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
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


def report(out: Path, train: Drawings, heldout: Drawings) -> None:
    """Print measures of the shipped folder through `FluxPipeline`: 20 steps, PROBED captions per line."""
    pipeline = FluxPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    print(f"round trip: held out {round_trip(pipeline.vae, heldout.images):.2f} dB")
    tower, captions = load_tower(), train.captions[:PROBED]
    rows = [
        ("bare", captions, 3.5, train),
        ("bare", captions, 1.0, train),
        ("worded", [f"an image of a {caption}" for caption in captions], 3.5, train),
        ("unseen wording", [UNSEEN_PHRASE.format(caption) for caption in captions], 3.5, train),
        ("empty", [""] * PROBED, 3.5, train),
        ("held out", heldout.captions[:PROBED], 3.5, heldout),
    ]
    for name, texts, guidance, part in rows:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = pipeline(
                texts,
                height=LATENT_SIDE,
                width=LATENT_SIDE,
                num_inference_steps=20,
                guidance_scale=guidance,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
            ).images
        found = decode(pipeline.vae, unpack(tokens.float()))
        print(json.dumps({"captions": name, "guidance": guidance, **measures(tower, found, part.images)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STEPS, "export", "report"])
    parser.add_argument("demo", type=Path, help="the folder that `bifrost data demo` wrote")
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
    arguments.work.mkdir(parents=True, exist_ok=True)
    train = read_drawings(f"{arguments.demo}/train-*.tar", arguments.seed)
    heldout = read_drawings(f"{arguments.demo}/heldout-*.tar", arguments.seed)
    if arguments.stage == "report":
        report(arguments.out, train, heldout)
        return
    stages = {"vae": vae_stage, "text": text_stage, "flux": flux_stage, "guidance": guidance_stage}
    torch.manual_seed(arguments.seed)
    steps = arguments.steps or STEPS[arguments.stage]
    stages[arguments.stage](arguments.work, train, heldout, steps, arguments.seed)


if __name__ == "__main__":
    main()
