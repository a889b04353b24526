"""A short campaign of random kills over either stage; `make faults N=1000` is the long one."""

import shutil
from pathlib import Path

import pytest

import runs
import small_model
import tiny_flux
from campaign import Campaign, differences
from campaign_report import ettr, page


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny-mllm", "tiny-controlnet"])
def test_killed_runs_end_like_undisturbed_ones(shards: Path, tmp_path: Path, recipe: str) -> None:
    settings = ["ema.decay=0.9", "global_batch=4", *small_model.settings(tmp_path / "backbone")]
    if recipe == "tiny-controlnet":
        settings += [f"flux.path={tiny_flux.save(tiny_flux.pipeline(), tmp_path / 'flux')}", "flux.image_size=32"]
    arguments = runs.arguments(shards, tmp_path, *settings, recipe=recipe)
    campaign = Campaign(tmp_path / "campaign", arguments, recipe, steps=14)
    campaign.until(6)
    assert campaign.wrong() == []
    assert sum(bool(kill.codes) for kill in campaign.kills) >= 3
    assert len(campaign.met()) > 30
    campaign = Campaign(tmp_path / "campaign", arguments, recipe, steps=14)  # as after an interruption
    text = page(campaign, "a machine")
    assert f"{sum(bool(kill.codes) for kill in campaign.kills)} kills in {len(campaign.runs)} runs" in text

    # The comparison at the end would have told.
    run, undisturbed = tmp_path / "campaign" / "shaken" / recipe, campaign.undisturbed
    assert differences(run, undisturbed) == []
    file = run / "checkpoints/step-00000014/rank-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert differences(run, undisturbed) == ["torn: step-00000014 differs in rank-00001.safetensors"]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 7,' not in line))
    shutil.rmtree(file.parent)
    *_, short, unsaved = differences(run, undisturbed)
    assert (short, unsaved) == ("line: 13 steps logged instead of 14", "resume: the last step was not saved")


def test_share_of_time_that_stays() -> None:
    assert ettr(1e9, 95, 5, 0) == pytest.approx(0.95, rel=1e-4)
    half_an_interval, restart = 0.5 * 105 / 10_000, 300 / 10_000
    assert ettr(10_000, 100, 5, 300) == pytest.approx(100 / 105 * (1 - half_an_interval) / (1 + restart), rel=0.01)
