"""How near the results of a run on editing pairs are to the targets of held-out pairs.

    python examples/score_edits.py runs/edits edits

RUN is trained on the demo's pairs in the folder PAIRS. Per kind of edit, the mean squared error to the target's latents
of what the run decodes with the pair's own source image and with another pair's, of the source's latents as they are,
and of the mean of the targets' latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bifrost.data import CaptionChoice, open_dataset
from bifrost.data.scenes.key import KEY, read_key
from bifrost.trainer.inference.latent_decoder import load_decoder
from bifrost.trainer.inference.settings import Settings

DECODING = Settings(steps=8)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--samples", type=int, default=64, help="the first pairs of each kind")
    given = parser.parse_args()
    decoder = load_decoder(given.run)
    captions = CaptionChoice({"txt": 1.0}, source_images="required")
    dataset = open_dataset(str(given.pairs / "heldout-*.tar"), captions=captions)
    pairs = [dataset.read(shard, row) for shard, count in enumerate(dataset.samples_per_shard) for row in range(count)]
    kinds = {key: scene.category for key, scene in read_key(given.pairs / KEY).items()}
    print(f"{'':10}{'own source':>12}{'another':>12}{'unchanged':>12}{'mean':>12}")
    for kind in sorted({kinds[pair.key] for pair in pairs}):
        chosen = [pair for pair in pairs if kinds[pair.key] == kind][: given.samples]
        targets = decoder.encode(torch.stack([decoder.source_image(pair.image) for pair in chosen]))
        sources = [decoder.source_image(pair.source_image) for pair in chosen]
        texts, seeds = [pair.caption for pair in chosen], list(range(len(chosen)))
        half = len(chosen) // 2
        found = [
            decoder.latents(texts, seeds, DECODING, sources),
            decoder.latents(texts, seeds, DECODING, sources[half:] + sources[:half]),
            decoder.encode(torch.stack(sources)),
            targets.mean(0, keepdim=True),
        ]
        errors = [(each - targets).square().mean().item() for each in found]
        print(f"{kind:10}" + "".join(f"{error:12.3f}" for error in errors))


if __name__ == "__main__":
    main()
