"""Invalid inputs: one line that names the cause and the remedy, exit code 2, nothing overwritten."""

import json
import shutil
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.recipes import FOLDER


def refused(ranks: int, *arguments: str) -> str:
    """The one line that `bifrost` ends with; before it, only a refused checkpoint may be logged."""
    ended = ranked.bifrost(ranks, *arguments)
    assert [rank.code for rank in ended] == [2] * ranks, ended[0].err
    *others, line = ended[0].err.strip().splitlines()
    assert line.startswith("error: "), ended[0].err
    assert all("refused" in other for other in others), ended[0].err
    assert all(not rank.err for rank in ended[1:])
    return line


def test_unknown_key(shards: Path, tmp_path: Path) -> None:
    line = refused(1, *runs.arguments(shards, tmp_path, "optimizer.learning_rate=1"))
    assert "unknown key optimizer.learning_rate" in line and "optimizer.lr?" in line
    assert "branch.positions" in refused(1, *runs.arguments(shards, tmp_path, "branch.position=mrope"))
    assert "steps" in refused(1, *runs.arguments(shards, tmp_path, "steps=many"))
    assert not any(tmp_path.iterdir())


def test_batch_that_does_not_divide(shards: Path, tmp_path: Path) -> None:
    line = refused(1, *runs.arguments(shards, tmp_path, "global_batch=10", "micro_batch=4"))
    assert "global_batch 10" in line and "micro_batch=5" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.multi
def test_missing_shard(shards: Path, tmp_path: Path) -> None:
    line = refused(2, *runs.arguments(shards, tmp_path, f"data.shards={shards}/train-{{00000..00004}}.tar"))
    assert "train-00004.tar" in line
    assert "nothing-*.tar" in refused(1, *runs.arguments(shards, tmp_path, f"data.shards={shards}/nothing-*.tar"))
    assert not any(tmp_path.iterdir())


def test_shards_without_captions(tmp_path: Path, shards: Path) -> None:
    from bifrost.data import write_shard

    write_shard(tmp_path / "train-0.tar", [("a", {"png": b"not read"}), ("b", {"png": b"not read", "txt": b" "})])
    line = refused(1, *runs.arguments(tmp_path, tmp_path / "runs"))
    assert "train-0.tar" in line and "caption" in line
    assert not (tmp_path / "runs").exists()


def test_table_without_captions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "table.csv").write_text("file,label\na.png,apple\n")
    (tmp_path / "images" / "a.png").write_bytes(b"")
    line = refused(
        1,
        "data",
        "ingest",
        str(tmp_path / "images"),
        str(tmp_path / "out"),
        "--table",
        str(tmp_path / "images" / "table.csv"),
    )
    assert "caption" in line and "label" in line
    assert not (tmp_path / "out").exists()


def test_too_few_samples(shards: Path, tmp_path: Path) -> None:
    line = refused(1, *runs.arguments(shards, tmp_path, "global_batch=64"))
    assert "60 samples" in line and "global_batch of 64" in line
    assert not any(tmp_path.iterdir())


def test_image_size_that_does_not_fit_the_tower(shards: Path, tmp_path: Path) -> None:
    assert "multiple of 28" in refused(1, *runs.arguments(shards, tmp_path, "data.image_size=100"))


def test_backbone_that_is_none(shards: Path, tmp_path: Path) -> None:
    assert "builtin:tiny" in refused(1, *runs.arguments(shards, tmp_path, "backbone.path=builtin:huge"))
    (tmp_path / "model").mkdir()
    assert "config.json" in refused(1, *runs.arguments(shards, tmp_path, f"backbone.path={tmp_path}/model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.multi
def test_a_run_goes_on_only_as_itself(shards: Path, tmp_path: Path) -> None:
    """Checkpoint of another backbone, other data, another seed: refused, and the run folder stays as it was."""
    from safetensors.torch import load_file, save_file

    assert ranked.bifrost(1, *runs.arguments(shards, tmp_path, "steps=1"))[0].code == 0
    run = tmp_path / "tiny-mllm"
    before = contents(run)

    other = tmp_path / "other"
    shutil.copytree(FOLDER / "foundations" / "tiny", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.up_proj.weight"))
    weights[name][7, 7] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = refused(2, *runs.arguments(shards, tmp_path, "steps=2", f"backbone.path={other}"))
    assert "other frozen weights than backbone.path=" in line

    assert "data.shards" in refused(
        1, *runs.arguments(shards, tmp_path, "steps=2", f"data.shards={shards}/*-00001.tar")
    )
    assert "seed was 0" in refused(1, *runs.arguments(shards, tmp_path, "steps=2", "seed=1"))
    assert 'branch.loss_tokens was "all" in this run and is "masked" now' in refused(
        1, *runs.arguments(shards, tmp_path, "steps=2", "branch.loss_tokens=masked")
    )

    damaged = run / "checkpoints/step-00000001/rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    line = refused(2, *runs.arguments(shards, tmp_path, "steps=2"))
    assert "none of its 1 checkpoints verifies" in line
    damaged.write_bytes(before["checkpoints/step-00000001/rank-00000.safetensors"])
    assert contents(run) == before
    aside = (run / "checkpoints/step-00000001").rename(tmp_path / "aside")
    line = refused(2, *runs.arguments(shards, tmp_path, "steps=2"))
    assert "checkpoints: holds no checkpoint, but this run saved one at step 1; put it back, or move" in line
    aside.rename(run / "checkpoints/step-00000001")
    assert contents(run) == before
    assert json.loads(before["checkpoints/step-00000001/state.json"])["progress"]["step"] == 1


def test_init_from_nothing(shards: Path, tmp_path: Path) -> None:
    assert "init_from" in refused(1, *runs.arguments(shards, tmp_path, "init_from=nowhere"))


@pytest.mark.multi
def test_data_lost_on_one_rank_alone_is_said_by_that_rank(shards: Path, tmp_path: Path) -> None:
    """A shard that vanishes during training: the affected rank reports it, and no rank is left waiting."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    ended = ranked.run(lose_a_shard, 2, str(copy), runs.arguments(copy, tmp_path, "steps=50"), timeout=90)
    messages = [rank.err for rank in ended if "error: rank" in rank.err]
    assert messages, [rank.err for rank in ended]
    assert "the shard ends inside it" in messages[0]
    assert all(rank.code for rank in ended)


def lose_a_shard(folder: str, arguments: list[str]) -> None:
    """Train; after the second step the shards are gone."""
    from bifrost.trainer.optim.engine import Engine

    step = Engine.step
    done = 0

    def losing(self, lr, skip):
        nonlocal done
        done += 1
        if done == 2:
            self.ranks.barrier()
            for file in Path(folder).glob("*.tar"):
                file.write_bytes(b"")
        return step(self, lr, skip)

    Engine.step = losing
    ranked.command(arguments)
