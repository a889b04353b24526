"""A short campaign of failing storage; `make faults-storage` is the long one."""

from pathlib import Path

import pytest

import ranked
from storage_campaign import TRAIN_EVERY, StorageCampaign, page


@pytest.mark.multi
def test_runs_on_failing_storage_read_the_correct_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = StorageCampaign(tmp_path / "campaign")
    try:
        campaign.until(3)
        campaign.runs.append(campaign._run(TRAIN_EVERY - 1))
        assert campaign.wrong() == []
        assert [run.kind for run in campaign.runs] == ["read", "read", "read", "train"]
        assert sum(sum(run.faults.values()) for run in campaign.runs) > 10
        assert "| wrong bytes | 0 |" in page(campaign, 4, "a machine")

        # It detects wrong bytes, a duplicate and a missing sample, and a failed run.
        real = ranked.run

        def worse(function, *args, **options):
            (ended,) = real(function, *args, **options)
            samples = ended.value["samples"]
            samples[0][1], samples[1] = "other", samples[2]
            return [ended]

        monkeypatch.setattr(ranked, "run", worse)
        campaign.runs = [campaign._run(0)]
        assert [text.split(": ")[1] for text in campaign.wrong()] == ["bytes", "lost", "lost"]
        ended = ranked.Rank(0, "", "", {"samples": [], "replaced": [], "error": "away"})
        monkeypatch.setattr(ranked, "run", lambda *args, **options: [ended])
        campaign.runs = [campaign._run(0)]
        assert campaign.wrong() == ["run 0: ended: away"]
    finally:
        campaign.close()
