"""Understanding is preserved by construction: the backbone answers the same before and after training, to the bit."""

from pathlib import Path

import pytest

import ranked
import runs


def logits_and_hash_around_training(arguments: list[str]) -> list:
    """Logits of the live backbone and a hash of its weights, right after it is built and after the last step."""
    import hashlib

    import torch

    from bifrost.kernels import PrefixLayout
    from bifrost.trainer.optim.engine import Engine
    from bifrost.trainer.training import train as run_module

    seen = []

    def look(engine: Engine) -> None:
        backbone = engine.model.backbone
        with torch.no_grad():
            hidden, _ = backbone.read(torch.arange(7, 39), PrefixLayout.of([20, 12], 16))
            embedding = _whole(backbone.text.embed_tokens.weight)
        weights = hashlib.sha256()
        for parameter in backbone.parameters():
            weights.update(_whole(parameter).float().numpy().tobytes())
        # The tiny model ties its output layer to the embedding.
        logits = hidden.float() @ embedding.float().T
        seen.append([hashlib.sha256(logits.numpy().tobytes()).hexdigest(), weights.hexdigest(), logits.std().item()])

    def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
        slice_ = parameter.ds_tensor
        parts = [torch.empty_like(slice_) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, slice_)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    loop = run_module.loop.run

    def watched(parts, progress) -> bool:
        look(parts.engine)
        finished = loop(parts, progress)
        look(parts.engine)
        return finished

    run_module.loop.run = watched
    ranked.succeed(arguments)
    return seen


@pytest.mark.multi
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_backbone_is_unchanged(shards: Path, tmp_path: Path, precision: str) -> None:
    arguments = runs.arguments(
        shards, tmp_path, "steps=5", f"precision={precision}", "optimizer.lr=0.01", "backbone.placement=sharded"
    )
    ended = ranked.run(logits_and_hash_around_training, 2, arguments)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for rank in ended:
        before, after = rank.value
        assert before == after
        assert before[2] > 0.01, "logits that say nothing prove nothing"
    losses = runs.losses(tmp_path / "tiny-mllm")
    assert losses[-1] != losses[0], "nothing was trained"
