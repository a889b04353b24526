"""ZeRO-3 on 1, 2 and 4 ranks trains like plain single-process PyTorch, whatever the accumulation."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ranked
import runs
from bifrost.data import Loader
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.engine import parameter_groups
from bifrost.trainer.inputs import open_inputs
from bifrost.trainer.schedule import learning_rate
from bifrost.trainer.stages.patch_latents import PatchLatentCollate, PatchLatentModel

STEPS = 20


def plain(recipe: Recipe) -> list[float]:
    """The losses of torch's own AdamW on the whole batch at once, in this process."""
    inputs = open_inputs(recipe, 1)
    model = PatchLatentModel(inputs.config, recipe)
    model.load(inputs.weights, recipe.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe), betas=recipe.optimizer.betas, eps=recipe.optimizer.eps
    )
    loader = Loader(
        inputs.dataset,
        inputs.plan,
        PatchLatentCollate(inputs.tokenizer, recipe, inputs.tokens),
        image_size=recipe.data.image_size,
        rank=0,
        ranks=1,
        global_batch=recipe.global_batch,
        micro_batch=recipe.global_batch,
        stop_step=recipe.steps,
    )
    losses = []
    for step, batch in enumerate(loader):
        mask = batch.arrays["mask"]
        tokens = mask.sum() if recipe.branch.loss_tokens == "masked" else mask.numel()
        loss = model(**batch.arrays, normalizer=float(tokens)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable().values(), recipe.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("branch.loss_tokens=all", "branch.positions=mrope"),
        (
            "branch.loss_tokens=masked",
            "branch.positions=learned",
            "activation_checkpointing=true",
            "optimizer.clip=0.5",
        ),
    ],
    ids=["all-mrope", "masked-learned"],
)
def test_ranks_equal_plain_pytorch(shards: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (f"steps={STEPS}", *settings)
    arguments = runs.arguments(shards, tmp_path, *settings)
    wanted = plain(load_recipe("tiny-mllm", arguments[2:]))
    assert len(wanted) == STEPS and wanted[-1] < 0.8 * wanted[0]
    digests = set()
    for ranks in (1, 2, 4):
        ended = ranked.bifrost(ranks, *runs.arguments(shards, tmp_path / str(ranks), *settings))
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
        run = tmp_path / str(ranks) / "tiny-mllm"
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        digests.add(tuple(line["digest"] for line in runs.steps(run)))
    assert len(digests) == 1, "another sequence of samples on another number of ranks"


@pytest.mark.multi
def test_the_fused_head_trains_like_the_reference(shards: Path, tmp_path: Path) -> None:
    """Triton's kernel, interpreted, under ZeRO-3 on two ranks: its weight is gathered for both passes."""
    losses = []
    for provider in ("reference", "triton"):
        settings = ("steps=5", "branch.loss_tokens=masked", f"kernels.provider={provider}")
        ended = ranked.bifrost(2, *runs.arguments(shards, tmp_path / provider, *settings))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        losses.append(runs.losses(tmp_path / provider / "tiny-mllm"))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
