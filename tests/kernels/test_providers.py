"""The choice between providers: preference, measurements and failures, with a fake timer."""

import subprocess
import sys

import pytest
import torch

from bifrost.kernels.providers import (
    LOSS_CANDIDATES,
    asked_or_fastest,
    choose_loss,
    choose_vision_attention,
    fastest,
)

WHERE = "a GPU at 8 x 8 bf16"


def choose(milliseconds: dict, **options):
    """`fastest` with candidates that take the given times, or raise if given an exception."""

    def timer(call):
        took = milliseconds[call()]
        if isinstance(took, Exception):
            raise took
        return took

    return fastest("loss", {name: lambda name=name: name for name in milliseconds}, WHERE, timer=timer, **options)


def test_fastest_is_chosen_and_the_reason_lists_all_times() -> None:
    choice = choose({"accurate": 0.9, "fused": 0.8, "plain": 0.844})
    assert (choice.operation, choice.provider, choice.failed) == ("loss", "fused", {})
    assert choice.milliseconds == {"accurate": 0.9, "fused": 0.8, "plain": 0.844}
    assert choice.reason == f"fastest on {WHERE}: fused 0.80 ms, plain 0.84 ms, accurate 0.90 ms"


def test_order_decides_within_the_slack() -> None:
    choice = choose({"accurate": 1.029, "fused": 1.0, "plain": 1.0})
    assert choice.provider == "accurate"
    assert choice.reason.startswith(f"preferred, within 3% of the fastest, on {WHERE}: fused 1.00 ms")
    assert choose({"accurate": 1.031, "fused": 1.0, "plain": 1.0}).provider == "fused"
    assert choose({"accurate": 1.031, "fused": 1.0}, slack=0.05).provider == "accurate"


def test_failed_candidate_is_left_out_with_its_error() -> None:
    choice = choose(
        {"accurate": RuntimeError("out of resource: shared memory\nand more"), "fused": 2.0, "odd": KeyError()}
    )
    assert choice.provider == "fused"
    assert choice.milliseconds == {"fused": 2.0}
    assert choice.failed == {"accurate": "out of resource: shared memory", "odd": "KeyError"}
    assert choice.reason == f"fastest on {WHERE}: fused 2.00 ms; failed: accurate, odd"


def test_all_candidates_failing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"loss: no candidate runs on a GPU.*no driver"):
        choose({"accurate": RuntimeError("no driver")})


def test_nothing_is_measured_without_a_gpu() -> None:
    choice = choose_loss(4096, 3584, 3584, torch.bfloat16, torch.device("cpu"))
    assert (choice.operation, choice.provider) == ("patch_latent_loss", "reference")
    assert "cpu" in choice.reason
    assert not choice.milliseconds and not choice.failed


def test_warp_specialization_is_never_chosen_automatically() -> None:
    assert LOSS_CANDIDATES[-1] == "reference"
    assert "triton-ws" not in LOSS_CANDIDATES


def test_choice_needs_only_torch_and_triton() -> None:
    """Kernels work without the trainer's requirements."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'deepspeed', 'pydantic', 'typer'), None));"
        "import bifrost.kernels.providers"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_attention_set_in_the_recipe_serves_the_vision_encoder_if_it_runs_there() -> None:
    def among(names):
        times = {"flash-attn-4": RuntimeError("head dimension 80 is not supported"), "varlen": 1.0, "sdpa": 3.0}
        return choose({name: times[name] for name in names})

    ready = ["varlen", "flash-attn-4", "sdpa"]
    assert asked_or_fastest("sdpa", ready, among).provider == "sdpa", "slower, but set"
    replaced = asked_or_fastest("flash-attn-4", ready, among)
    assert replaced.provider == "varlen"
    assert "flash-attn-4 does not run" in replaced.reason and "head dimension 80" in replaced.reason
    assert asked_or_fastest(None, ready, among).provider == "varlen"
    with pytest.raises(RuntimeError, match="no candidate"):
        asked_or_fastest(None, ["flash-attn-4"], among)


@pytest.mark.parametrize(("asked", "used"), [(None, "sdpa"), ("reference", "reference")])
def test_without_a_gpu_the_vision_encoder_uses_torch_or_what_is_set(asked, used: str) -> None:
    windows = [((64,) * 4, 3), ((256,), 1)]
    choice = choose_vision_attention(windows, (16, 16, 80), torch.bfloat16, torch.device("cpu"), asked)
    assert (choice.operation, choice.provider, choice.milliseconds) == ("vision_attention", used, {})
