"""Scenes of an evaluation with their ground truth, chosen by category from shards of the demo's scenes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...data.scenes.grammar import Object, Scene
from ...data.scenes.heldout import CATEGORY_NAMES
from ...data.shard_list import format_shards
from ..errors import RunError
from .samples import Sample, SampleSet

Prompt = tuple[str, frozenset[Object]]
"""A caption and what it describes; or an instruction and its result, which has other results for other sources."""


@dataclass(frozen=True)
class SceneSample(Sample):
    """An image-caption pair whose objects are known."""

    scene: Scene


def choose_scenes(
    samples: SampleSet, truth: Mapping[str, Scene], count: int, known: Collection[Prompt] = ()
) -> list[SceneSample]:
    """Up to `count` scenes of every category of the data, by category in the order of CATEGORY_NAMES.

    The scenes of a category have distinct objects, so that another one's image is never right; they are readable, and
    their prompts are not in `known`. RunError if `truth` lacks a sample, or a category has fewer than two scenes.
    """
    chosen: dict[str, dict[frozenset[Object], SceneSample]] = {}
    shared = dict.fromkeys(CATEGORY_NAMES, 0)
    for index in map(int, samples.order):
        scene = _scene_of(samples, truth, index)
        found = chosen.setdefault(scene.category, {})
        objects = frozenset(scene.objects)
        if len(found) == count or objects in found:
            continue
        if (scene.caption, objects) in known:
            shared[scene.category] += 1
        elif sample := samples.read(index):
            if sample.caption != scene.caption:
                raise _foreign(samples, sample.key, f"is {sample.caption!r} there and {scene.caption!r} here")
            found[objects] = SceneSample(**vars(sample), scene=scene)
    for category, found in chosen.items():
        if len(found) < 2:
            others = f" ({shared[category]} others have a caption of --data)" if shared[category] else ""
            raise RunError(
                f"{format_shards(samples.dataset.shards)}: {len(found)} readable scenes of the category {category}"
                f"{others}, at least 2 needed; give more shards"
            )
    return [sample for category in sorted(chosen, key=CATEGORY_NAMES.index) for sample in chosen[category].values()]


def prompts(samples: SampleSet, truth: Mapping[str, Scene]) -> set[Prompt]:
    """The prompts of all scenes of a data set. RunError if `truth` lacks one."""
    scenes = (_scene_of(samples, truth, index) for index in range(len(samples.dataset)))
    return {(scene.caption, frozenset(scene.objects)) for scene in scenes}


def _scene_of(samples: SampleSet, truth: Mapping[str, Scene], index: int) -> Scene:
    key = samples.key(index)
    if (scene := truth.get(key)) is None:
        raise _foreign(samples, key, "is missing")
    return scene


def _foreign(samples: SampleSet, key: str, how: str) -> RunError:
    return RunError(
        f"--scenes: sample {key} of {format_shards(samples.dataset.shards)} {how}; give the KEY.json that was written"
        " with these shards"
    )
