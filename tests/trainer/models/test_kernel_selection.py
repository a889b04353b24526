"""Kernel selection: equal on every rank, kept over restarts, refused where a kernel cannot run."""

import json
import os
import typing
from pathlib import Path

import pytest
import torch

import ranked
import runs
from bifrost.kernels.attention import Backend
from bifrost.kernels.latent_loss import Provider
from bifrost.kernels.providers import Choice
from bifrost.recipes import load_recipe
from bifrost.recipes.schema import Kernels
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import backbone, kernel_selection
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import architecture, locate
from bifrost.trainer.models.kernel_selection import make_deterministic

ALONE = Ranks(0, 1, torch.device("cpu"))


def choose(folder: Path, *overrides: str, ranks: Ranks = ALONE):
    config = read_config(locate("builtin:tiny"))
    recipe = load_recipe("tiny-mllm", overrides)
    shapes = recipe.micro_batch, 16, recipe.branch.max_text_tokens, recipe.precision
    work = kernel_selection.KernelWork.of(config, *shapes)
    vision = kernel_selection.VisionWork.of(config, recipe.micro_batch, (recipe.data.image_size,) * 2, recipe.precision)
    return kernel_selection.choose_kernels(recipe.kernels, work, vision, ranks, folder)


def test_recipes_name_what_the_kernels_have() -> None:
    hints = typing.get_type_hints(Kernels)
    assert typing.get_args(hints["head_backend"]) == ("auto", *typing.get_args(Provider))
    assert typing.get_args(hints["attention"]) == ("auto", *typing.get_args(Backend))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they are measured")
def test_without_a_gpu_it_is_plain_pytorch(tmp_path: Path) -> None:
    kernels, record = choose(tmp_path)
    assert kernels == kernel_selection.KernelChoice("reference", "sdpa", "sdpa", "torch")
    assert all(not choice["milliseconds"] for choice in record.values()), "nothing was measured"


def test_kernels_set_in_the_recipe_are_used(tmp_path: Path) -> None:
    kernels, record = choose(tmp_path, "kernels.head_backend=in-place", "kernels.attention=reference")
    assert (kernels.head, kernels.attention, kernels.vision) == ("in-place", "reference", "reference")
    assert record["patch_latent_loss"]["reason"] == "set in the recipe"


@pytest.mark.parametrize(
    "setting", ["kernels.attention=varlen", "kernels.attention=flash-attn-2", "kernels.elementwise=liger"]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run on a GPU")
def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path, setting: str) -> None:
    with pytest.raises(RunError, match=f"{setting.split('=')[0]}: .* needs a CUDA device") as caught:
        choose(tmp_path, setting)
    assert "\n" not in str(caught.value)


def test_a_measured_choice_is_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["in-place", "triton", "triton-tma"])
    monkeypatch.setattr(
        kernel_selection, "choose_loss", lambda *_: Choice("patch_latent_loss", next(answers), "measured", {"x": 1.0})
    )
    kernels, record = choose(tmp_path)
    assert kernels.head == "in-place"
    (tmp_path / kernel_selection.FILE).write_text(json.dumps(record))
    assert choose(tmp_path)[0].head == "in-place", "the same shape on the same device"
    assert choose(tmp_path, "micro_batch=8")[0].head == "triton", "another shape"
    (tmp_path / kernel_selection.FILE).write_text("{")
    assert choose(tmp_path)[0].head == "triton-tma", "an unreadable record is ignored"


class Second(Ranks):
    """Rank 1 of two, whose rank 0 has chosen."""

    def gather(self, value: object) -> list:
        chosen = (("patch_latent_loss", "triton"), ("prefix_attention", "reference"), ("vision_attention", "varlen"))
        return [{name: {"provider": provider} for name, provider in chosen}, value]


def test_other_ranks_use_the_choice_of_rank_0(tmp_path: Path) -> None:
    kernels, _ = choose(tmp_path, ranks=Second(1, 2, torch.device("cpu")))
    assert (kernels.head, kernels.attention, kernels.vision) == ("triton", "reference", "varlen")


@pytest.mark.parametrize("shape", [(448, 448), (392, 392), (336, 588)])
def test_segments_are_those_of_the_vision_encoder(shape: tuple[int, int]) -> None:
    """Against transformers' own tables: 448 px divide into windows, 392 px do not, and 336 x 588 along one side."""
    config = read_config(architecture("Qwen/Qwen2.5-VL-7B-Instruct"))
    work = kernel_selection.VisionWork.of(config, 2, shape, "bf16")
    vision = config.vision_config
    rows, columns = (side // vision.patch_size for side in shape)
    sizes = vision.spatial_merge_size, vision.window_size, vision.patch_size
    ends = backbone._geometry(2, rows, *sizes, torch.device("cpu"), columns)["cu_window_seqlens"]
    (windows, windowed), (images, whole) = work.segmentations
    assert sorted(windows) == sorted(ends.diff().tolist())
    assert images == (rows * columns,) * 2
    assert (windowed, whole, work.heads) == (28, 4, (16, 16, 80))


def test_a_run_without_branch_and_vision_encoder_chooses_nothing(tmp_path: Path) -> None:
    chosen = kernel_selection.choose_kernels(Kernels(), None, None, ALONE, tmp_path)
    assert chosen == (kernel_selection.KernelChoice(), {})


@pytest.mark.multi
def test_a_run_logs_and_keeps_its_choice(shards: Path, tmp_path: Path) -> None:
    (ended,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path, "steps=1"))
    assert ended.code == 0, ended.err
    run = tmp_path / "tiny-mllm"
    assert json.loads((run / "kernels.json").read_text())["patch_latent_loss"]["provider"] == "reference"
    assert (run / "logs" / "rank-00000.log").read_text().count("patch_latent_loss by reference") == 1


def test_a_deterministic_run_sets_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention respects it: torch's own directly, packages through `kernels.attention`."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        # With warnings alone FlashAttention stays as it is.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "cuBLAS raises without it"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
