"""A short campaign of random kills for both stages; `make faults N=1000` is the long one."""

import shutil
from pathlib import Path

import pytest

import mixed_run
import runs
import small_model
import tiny_flux
from campaign import Campaign, differences
from campaign_report import MIXTURE, ettr, page


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "steps", "mixture"),
    [("tiny-mllm", 12, False), ("tiny-controlnet", 8, False), ("tiny-controlnet", 8, True)],
    ids=["stage-1", "stage-2", "mixture-in-buckets"],
)
def test_killed_runs_equal_uninterrupted_ones(
    shards: Path, tmp_path: Path, recipe: str, steps: int, mixture: bool
) -> None:
    settings = ["ema.decay=0.9", "global_batch=4", *small_model.settings(tmp_path / "backbone")]
    if recipe == "tiny-controlnet":
        settings += [f"flux.path={tiny_flux.save(tiny_flux.pipeline(), tmp_path / 'flux')}", "flux.image_size=32"]
    arguments = mixed_run.arguments(tmp_path) if mixture else runs.arguments(shards, tmp_path, *settings, recipe=recipe)
    campaign = Campaign(tmp_path / "campaign", arguments, recipe, steps, kills_per_run=5)
    campaign.until(4)
    assert campaign.wrong() == []
    assert campaign.sent() >= 4
    assert len(campaign.met()) > 30
    campaign = Campaign(tmp_path / "campaign", arguments, recipe, steps, kills_per_run=5)  # as after an interruption
    text = page(campaign, MIXTURE, 4, "a machine")
    assert f"{campaign.sent()} kills in {len(campaign.runs)} runs" in text

    # The comparison at the end detects differences.
    run, uninterrupted = tmp_path / "campaign" / "shaken" / recipe, campaign.uninterrupted
    assert differences(run, uninterrupted) == []
    file = run / f"checkpoints/step-{steps:08d}/rank-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert differences(run, uninterrupted) == [f"torn: step-{steps:08d} differs in rank-00001.safetensors"]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 7,' not in line))
    shutil.rmtree(file.parent)
    *_, short, unsaved = differences(run, uninterrupted)
    assert (short, unsaved) == (
        f"line: {steps - 1} steps logged instead of {steps}",
        "resume: the last step was not saved",
    )


def test_effective_training_time_ratio() -> None:
    assert ettr(1e9, 95, 5, 0) == pytest.approx(0.95, rel=1e-4)
    half_an_interval, restart = 0.5 * 105 / 10_000, 300 / 10_000
    assert ettr(10_000, 100, 5, 300) == pytest.approx(100 / 105 * (1 - half_an_interval) / (1 + restart), rel=0.01)
