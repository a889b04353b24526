"""The files of a model: chosen as the libraries do, checked against them, and never outside the folder."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import tiny_flux
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.flux import FluxFolder
from bifrost.trainer.models.safetensors_files import weight_files
from bifrost.trainer.models.weights import WeightFiles


def save(folder: Path, name: str, value: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.full((2,), value)}, folder / name)
    return folder / name


def index(folder: Path, stem: str, *names: str) -> None:
    about = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(about))


def test_transformers_own_order(tmp_path: Path) -> None:
    """Saved in shards, then again as one file: the index stays, and the library reads the file."""
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path, max_shard_size="1KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    CLIPTextModel(config).save_pretrained(tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path).state_dict()
    assert (tmp_path / "model.safetensors.index.json").is_file(), "if it goes, the rule is no longer needed"
    ours = WeightFiles(tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    for name in ours.names:
        assert torch.equal(ours.full(name), again[name])


def test_diffusers_own_order(tmp_path: Path) -> None:
    transformer = tiny_flux.pipeline().transformer
    transformer.save_pretrained(tmp_path, max_shard_size="40KB")
    stale = {name: torch.zeros_like(p) for name, p in transformer.state_dict().items()}
    save_file(stale, tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict()
    ours = WeightFiles(tmp_path)
    assert all(torch.equal(ours.full(name), theirs[name]) for name in theirs)
    assert torch.count_nonzero(ours.full("x_embedder.weight"))


def test_a_stale_index_of_a_flux_part(tmp_path: Path) -> None:
    """diffusers saves in shards, then as one file: the shards go, the index stays."""
    transformer = tiny_flux.pipeline().transformer
    transformer.save_pretrained(tmp_path, max_shard_size="40KB")
    transformer.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file(), "no longer so"
    assert weight_files(tmp_path) == [tmp_path / "diffusion_pytorch_model.safetensors"]
    ours = WeightFiles(tmp_path)
    assert all(torch.equal(ours.full(name), value) for name, value in transformer.state_dict().items())


def test_variants_are_not_mixed_in(tmp_path: Path) -> None:
    plain, variant = save(tmp_path, "model.safetensors", 1.0), save(tmp_path, "model.fp16.safetensors", 2.0)
    save(tmp_path, "consolidated.safetensors", 3.0)
    assert weight_files(tmp_path) == [plain]
    plain.unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(RunError, match=r"only a variant, model\.fp16\.safetensors; fetch model\.safetensors"):
        weight_files(tmp_path)
    assert load_file(variant)["w"][0] == 2


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b", ""])
def test_an_index_may_only_name_files_in_its_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path, "other.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "sub", "a.safetensors")
    index(folder, "model", name)
    with pytest.raises(RunError, match=r"index\.json: names .*which is not a file in this folder"):
        weight_files(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00002.safetensors")
    with pytest.raises(RunError, match=r"model-00002-of-00002\.safetensors: missing, one of the model's 2"):
        weight_files(tmp_path)
    index(tmp_path, "model", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with pytest.raises(
        RunError, match=r": 1 tensors are missing: .*index\.json names model-00002-of-00002\.safetensors"
    ):
        weight_files(tmp_path)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(RunError, match="not a weight index"):
            weight_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("pytorch_model.bin", "pickles"),
        ("model-Q4_K_M.gguf", "GGUF, which is quantized"),
        ("flax_model.msgpack", "Flax"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, file: str, what: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(RunError, match=f"no safetensors files there; {file} is .*{what}"):
        weight_files(tmp_path)


def test_a_flux_of_pickles_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = tiny_flux.save(tiny_flux.pipeline(), tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(RunError, match=r"text_encoder: no safetensors files there; pytorch_model\.bin is PyTorch"):
        FluxFolder.open(folder)
