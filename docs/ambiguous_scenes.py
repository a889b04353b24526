"""Scenes whose captions leave something open: shards of them, and what stage-1 runs make of it.

    python docs/ambiguous_scenes.py write ambiguous
    python docs/ambiguous_scenes.py score ambiguous runs/linear runs/flow

`write` makes shards of three kinds of captions, each of which allows several scenes, all equally frequent. `score`
decodes latents of every caption with several seeds, turns them into pixels by a linear probe, reads the objects, and
prints a Markdown table: accuracy is the fraction of images that show exactly one of the allowed scenes, coverage the
fraction of the allowed scenes that some image of the caption shows. Both are means over captions. Then it
times decoding.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from bifrost.data import DataError, Dataset, open_dataset
from bifrost.data.scenes.drawings import Look
from bifrost.data.scenes.grammar import Object, Scene, article, render
from bifrost.data.scenes.places import CENTRE, CORNERS, LEFT, RIGHT
from bifrost.data.scenes.scorer import read
from bifrost.data.write import write_shard
from bifrost.recipes import RecipeError
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.pixel_probe import PixelProbe
from bifrost.trainer.evaluation.samples import SampleSet, stack
from bifrost.trainer.inference.latent_decoder import LatentDecoder, load_decoder
from bifrost.trainer.inference.settings import Settings
from bifrost.trainer.models.flow_head import FlowHead

GROUPS = {
    "animal": ("cat", "dog", "owl", "frog", "crab"),
    "fruit": ("apple", "banana", "lemon", "strawberry", "pineapple"),
    "vehicle": ("bus", "bicycle", "rocket", "boat"),
}
THINGS = tuple(Look(thing) for group in GROUPS.values() for thing in group)
SAMPLES, SHARD = 4200, 600
PROBE_IMAGES = 500
BATCH, TURNS = 32, 10


def captions() -> dict[str, dict[str, list[Scene]]]:
    """Kind -> caption -> the scenes that it allows."""
    found: dict[str, dict[str, list[Scene]]] = {"order": {}, "place": {}, "kind": {}}
    for pair in combinations(THINGS, 2):
        caption = f"{article(pair[0])} next to {article(pair[1])}"
        found["order"][caption] = [
            Scene("order", caption, (Object(pair[0], one), Object(pair[1], other)))
            for one, other in ((LEFT, RIGHT), (RIGHT, LEFT))
        ]
    for look in THINGS:
        caption = f"{article(look)} in a corner"
        found["place"][caption] = [Scene("place", caption, (Object(look, corner),)) for corner in CORNERS]
    for name, group in GROUPS.items():
        caption = article(Look(name))
        found["kind"][caption] = [Scene("kind", caption, (Object(Look(thing), CENTRE),)) for thing in group]
    return found


def scenes(count: int) -> Iterator[Scene]:
    """`count` scenes: kind, caption and scene are drawn with equal probabilities."""
    draws, kinds = np.random.default_rng(0), [list(each.values()) for each in captions().values()]
    for _ in range(count):
        every = kinds[draws.integers(len(kinds))]
        allowed = every[draws.integers(len(every))]
        yield allowed[draws.integers(len(allowed))]


def write(folder: Path) -> None:
    chosen = list(scenes(SAMPLES))
    for start in range(0, len(chosen), SHARD):
        part = chosen[start : start + SHARD]
        named = ((f"{start + number:05d}", _sample(scene)) for number, scene in enumerate(part))
        write_shard(folder / f"train-{start // SHARD:05d}.tar", named)


def _sample(scene: Scene) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "png")
    return {"png": file.getvalue(), "txt": scene.caption.encode()}


def probe(decoder: LatentDecoder, data: Dataset) -> PixelProbe:
    samples = SampleSet("train", data, 0, (decoder.image_size, decoder.image_size))
    images = (stack([sample.seen for sample in part]) for part in samples.gallery(PROBE_IMAGES, 64))
    return PixelProbe((decoder.encode(each), each) for each in images)


def score(name: str, decoder: LatentDecoder, data: Dataset, asked: argparse.Namespace) -> None:
    """Print the table's rows of a run."""
    pixels, settings = probe(decoder, data), chosen_settings(decoder, asked)
    for kind, every in captions().items():
        chosen = [
            every[caption] for caption in sorted(every)[:: max(1, len(every) // asked.captions)][: asked.captions]
        ]
        prompts = [allowed[0].caption for allowed in chosen for _ in range(asked.seeds)]
        latents = decoder.decoded(prompts, list(range(len(prompts))), settings, BATCH)
        objects = [frozenset(found.objects) for found in read(pixels.images(latents))]
        accuracy, coverage = [], []
        for number, allowed in enumerate(chosen):
            shown = objects[number * asked.seeds : (number + 1) * asked.seeds]
            right = [frozenset(scene.objects) for scene in allowed]
            accuracy.append(np.mean([each in right for each in shown]))
            coverage.append(np.mean([each in shown for each in right]))
        possible = sum(map(len, chosen)) / len(chosen)
        print(f"| {name} | {kind} | {possible:.3g} | {np.mean(accuracy):.2f} | {np.mean(coverage):.2f} |")


def chosen_settings(decoder: LatentDecoder, asked: argparse.Namespace) -> Settings:
    flow = isinstance(decoder.mllm.head, FlowHead)
    return Settings(asked.steps, temperature=asked.temperature if flow else 1.0)


def decoding_times(decoders: list[LatentDecoder], asked: argparse.Namespace) -> list[float]:
    """Milliseconds per image of decoding a batch, of every run: the fastest of some turns, which the runs take one
    after the other, so that other work on the machine matters little."""
    prompts = [caption for each in captions().values() for caption in each][:BATCH]
    times: list[list[float]] = [[] for _ in decoders]
    for _ in range(TURNS):
        for decoder, own in zip(decoders, times, strict=True):
            start = time.perf_counter()
            decoder.latents(prompts, range(len(prompts)), chosen_settings(decoder, asked)).cpu()
            own.append(1000 * (time.perf_counter() - start) / len(prompts))
    return [min(own) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("folder", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("folder", type=Path)
    scoring.add_argument("runs", type=Path, nargs="+")
    scoring.add_argument("--seeds", type=int, default=16)
    scoring.add_argument("--captions", type=int, default=14, help="of each kind, at most")
    scoring.add_argument("--steps", type=int, default=16)
    scoring.add_argument("--temperature", type=float, default=1.0, help="of runs with a flow head")
    asked = parser.parse_args()
    if asked.command == "write":
        return write(asked.folder)
    data = open_dataset(f"{asked.folder}/train-*.tar")
    decoders = [load_decoder(run) for run in asked.runs]
    print("| run | caption leaves open | scenes allowed | accuracy | coverage |\n|---|---|---:|---:|---:|")
    for run, decoder in zip(asked.runs, decoders, strict=True):
        score(run.name, decoder, data, asked)
    print(f"\ndecoding, batches of {BATCH} on {decoders[0].device.type}:")
    times = decoding_times(decoders, asked)
    for run, each in zip(asked.runs, times, strict=True):
        print(f"{run.name}: {each:.1f} ms per image, {each / times[0]:.2f} x {asked.runs[0].name}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, RecipeError, RunError) as error:
        sys.exit(str(error))
