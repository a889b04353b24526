"""Runs on two nodes whose network fails; `make faults-network` plays all faults, with the default timeouts."""

import re
from pathlib import Path

import pytest

import two_nodes
from cable import Link
from network_campaign import Found, NetworkCampaign, Play, differences
from network_report import page
from two_nodes import TwoNodes

pytestmark = pytest.mark.skipif(two_nodes.missing() is not None, reason=str(two_nodes.missing()))

BOUND_S = 6.0


def short_cut_then_a_lost_node(play: Play) -> Found:
    """A cut link that comes back, then the node of rank 0 is lost."""
    play.to_the_fault()
    play.link(Link(loss=1))
    step = len(play.job.new_steps())
    with pytest.raises(AssertionError, match="no step"):
        play.job.wait_for_step(step + 2, timeout=2)
    play.link(Link())
    play.job.wait_for_step(step + 2)
    began = play.link(Link(loss=1))
    play.job.lose(0)
    return play.end(began, BOUND_S, "node1 vanishes")


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_outlasts_a_cut_link_and_a_lost_node(shards: Path, tmp_path: Path) -> None:
    with TwoNodes() as nodes:
        campaign = NetworkCampaign(nodes, tmp_path, shards, ["steps=18", f"watchdog.step_timeout_s={BOUND_S:.0f}"])
        found = campaign.play("faults", short_cut_then_a_lost_node)
        assert found.wrong == [] and found.codes == [76, 76]
        # The two ranks left wait ten seconds for the reports of the others.
        assert found.detected_s is not None and BOUND_S <= found.detected_s < BOUND_S + 30
        error, decision = found.lines
        reason = r"no step for \d+ s \(bound 6 s\): rank 0 on node1 does not answer nor do 1 others: it is gone"
        assert re.match(f"error: {reason}", error), error
        assert re.match(f"rank 2: {reason}.*: requeued, from step 8", decision), decision
        assert found.did.startswith("ended with code 76, resumed from step 8")
        assert "1 of 1 runs equal the undisturbed one" in page(campaign, "a machine")

    # It detects a different loss and a missing step.
    lines = campaign.undisturbed
    assert differences(lines[:-1], lines) == f"{len(lines) - 1} steps instead of {len(lines)}"
    assert "instead of" in differences([*lines[:-1], lines[-1] | {"loss": 0.0}], lines)
