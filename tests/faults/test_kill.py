"""SIGKILL at random moments, in the middle of saves too: every start goes on from a verified checkpoint, and the end
is that of a run that nobody disturbed. `--kills 20` for the full campaign."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

import ranked
import runs
import tiny_flux

STEPS = 40


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny-mllm", "tiny-controlnet"])
def test_killed_runs_end_like_undisturbed_ones(
    shards: Path, tmp_path: Path, request: pytest.FixtureRequest, recipe: str
) -> None:
    kills = request.config.getoption("--kills")
    steps = max(STEPS, 4 * kills)
    settings = (f"steps={steps}", "checkpoint.every=2", "ema.decay=0.9", "data.workers=1")
    if recipe == "tiny-controlnet":
        flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
        settings = (*settings, f"flux.path={flux}", "micro_batch=4")
    calm = runs.arguments(shards, tmp_path / "calm", *settings, recipe=recipe)
    assert [rank.code for rank in ranked.bifrost(2, *calm)] == [0, 0]

    chance = random.Random(kills)
    run = tmp_path / "shaken" / recipe
    arguments = runs.arguments(shards, tmp_path / "shaken", *settings, recipe=recipe)
    moments = [start_and_kill(arguments, run, chance, tmp_path / f"meeting-{kill}", kill) for kill in range(kills)]
    assert [rank.code for rank in ranked.bifrost(2, *arguments)] == [0, 0]

    undisturbed = tmp_path / "calm" / recipe
    exact = ("step", "samples", "loss", "grad_norm", "digest")
    assert [[line[key] for key in exact] for line in runs.steps(run)] == [
        [line[key] for key in exact] for line in runs.steps(undisturbed)
    ]
    last = f"checkpoints/step-{steps:08d}"
    for rank in range(2):
        file = f"{last}/rank-{rank:05d}.safetensors"
        assert (run / file).read_bytes() == (undisturbed / file).read_bytes()
    starts = [start["step"] for start in runs.events(run, "start")]
    assert starts == sorted(starts), "a start went further back than the one before it"
    print(f"{kills} kills: {moments}; starts at steps {starts}")


def start_and_kill(arguments: list[str], run: Path, chance: random.Random, folder: Path, number: int) -> str:
    """Start the run, kill one rank or both at a random moment, and say when it was."""
    folder.mkdir()
    before = len(runs.lines(run)) if (run / "metrics.jsonl").exists() else 0
    processes = ranked.start(ranked.command, 2, arguments, folder=folder)
    # Every third kill hits a save under way, every fifth the start-up.
    moment = "save" if number % 3 == 1 else "start" if number % 5 == 0 else "step"
    deadline = time.monotonic() + 60
    if moment == "start":
        time.sleep(chance.uniform(0.1, 3))
    else:
        while time.monotonic() < deadline and all(process.is_alive() for process in processes):
            begun = (run / "metrics.jsonl").exists() and len(runs.lines(run)) > before + 1
            if begun and (moment == "step" or any((run / "checkpoints").glob(".step-*.partial"))):
                break
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.6) if moment == "step" else chance.uniform(0, 0.01))
    for victim in chance.choice((processes, processes[:1], processes[1:])):
        os.kill(victim.pid, signal.SIGKILL)
    # As the launcher does: a rank that waits for a dead one, in the rendezvous say, is ended after a while.
    for process in processes:
        process.join(10)
        process.kill()
    ended = ranked.finish(processes, folder)
    assert any(rank.code == -signal.SIGKILL for rank in ended), "the run ended before it was killed: raise STEPS"
    return moment
