"""The folder of a pipeline: what is written, what a wrong one is refused with, bases in other places, the hub."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import hub_server
import run_folders
from bifrost import BifrostPipeline
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.export_pipeline import export_pipeline
from bifrost.trainer.models import hub as model_hub

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"steps": 4, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def folder(place: Path, mllm: Path, controlnet: Path) -> Path:
    """A pipeline of the checkpoints of both runs."""
    checkpoints = (run / "checkpoints" / "step-00000007" for run in (mllm, controlnet))
    assert export_pipeline(*checkpoints, place / "stored", torch.bfloat16) == (7, 7)
    return place / "stored"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def sealed(folder: Path) -> None:
    """Accept the changed files of a folder: list them with their hashes now."""
    names = sorted(
        f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != "SHA256SUMS"
    )
    listed = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "SHA256SUMS").write_text(listed.stdout)


def refused(folder: object, message: str, **options: object) -> None:
    with pytest.raises(RunError, match=message) as caught:
        BifrostPipeline.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


def test_the_folder_has_weights_card_licences_recipes_and_hashes(folder: Path, mllm: Path, controlnet: Path) -> None:
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {
        *("README.md", "LICENCES.md", "SHA256SUMS", "model_index.json", "pipeline.py"),
        *("mllm/config.json", "mllm/model.safetensors", "recipes/mllm.yaml", "recipes/controlnet.yaml"),
        *("controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors"),
    }
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(files) - 2, "all but itself and the card"
    averaged = Store(mllm / "checkpoints").newest_verified()
    assert averaged is not None
    for name, tensor in load_file(folder / "mllm" / "model.safetensors").items():
        assert torch.equal(tensor, averaged.full("ema", name).bfloat16())
    for name, run in (("mllm", mllm), ("controlnet", controlnet)):
        assert load_recipe(folder / "recipes" / f"{name}.yaml") == load_recipe(run / "recipe.yaml")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.text.count("| step | 7 |") == 2 and "EMA" in card.text and "64 x 64 pixels" in card.text
    licences = (folder / "LICENCES.md").read_text()
    assert "CC BY-SA 4.0" in licences and "must credit OpenMoji" in licences, "the notice next to builtin:tiny"


def test_no_private_folder_and_no_secret_is_in_the_texts(
    mllm: Path, controlnet: Path, flux: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(mllm, tmp_path / "run"))
    recipe = load_recipe(run / "recipe.yaml", ["data.shards=https://x.org/a.tar?X-Amz-Signature=secret123"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    export_pipeline(run, controlnet, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"secret123" not in file.read_bytes(), file
    for name in ("README.md", "LICENCES.md"):
        assert str(flux.parent) not in (tmp_path / "out" / name).read_text()


def test_a_wrong_folder_is_one_line(copy: Path, flux: Path, mllm: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", r"^pipeline=\S+nothing: no such folder, and not a hub id")
    refused(copy / "model_index.json", rf"^pipeline=\S+model_index.json: is a file; give its folder, {copy}$")
    refused(mllm, "mllm: has no model_index.json; give a folder that `bifrost export --format pipeline` wrote")
    refused(flux, "is of a FluxPipeline, expected BifrostPipeline")
    index = copy / "model_index.json"
    text = index.read_text()
    for changed, message in (
        (text[:-9], "is not JSON"),
        (text.replace('"PatchLatentDecoder"', '"UNet2DModel"'), "mllm is .*UNet2DModel.*, expected"),
        (text.replace('"image_size"', '"image_sise"'), r"flux: unknown key image_sise; did you mean image_size\?"),
        (text.replace('"image_size": 64', '"image_size": 63'), "flux.image_size=63: does not fit"),
        (json.dumps({**json.loads(text), "flux": "x"}), "flux: give a mapping"),
    ):
        assert changed != text
        index.write_text(changed)
        refused(copy, message)
    index.write_text(text)
    shutil.rmtree(copy / "mllm")
    refused(copy, "copy/mllm: no such folder; fetch the pipeline again")


def test_weights_of_another_stage_or_another_model_are_one_line(copy: Path, place: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "mllm" / "config.json").read_text())
    config["recipe"] = load_recipe("tiny-controlnet").model_dump(mode="json")
    (copy / "mllm" / "config.json").write_text(json.dumps(config))
    sealed(copy)
    refused(copy, "mllm: is a controlnet run, expected a patch-latents run")


def test_missing_unknown_and_damaged_files_are_found(copy: Path) -> None:
    weights = copy / "mllm" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    refused(copy, r"mllm/model\.safetensors: its SHA-256 is not that in SHA256SUMS; fetch it again")
    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    (copy / "controlnet" / "extra.safetensors").write_bytes(b"")
    refused(copy, r"controlnet/extra\.safetensors: not in SHA256SUMS; remove it")
    (copy / "controlnet" / "extra.safetensors").unlink()
    (copy / "README.md").write_text("edited before it was published")
    (copy / ".gitattributes").write_text("of the hub")
    BifrostPipeline.from_pretrained(copy)
    weights.unlink()
    refused(copy, r"mllm/model\.safetensors: missing, SHA256SUMS lists it")
    (copy / "SHA256SUMS").unlink()
    refused(copy, "copy: has no SHA256SUMS")


def test_a_missing_tensor_is_one_line_also_where_the_hashes_agree(copy: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(copy / "mllm" / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, copy / "mllm" / "model.safetensors")
    sealed(copy)
    refused(copy, r"head\.weight")


def test_frozen_models_that_are_elsewhere(copy: Path, flux: Path, place: Path, tmp_path: Path, caplog) -> None:
    wanted = BifrostPipeline.from_pretrained(copy)("moon", output_type="np", **FEW).images
    moved = Path(shutil.copytree(flux, tmp_path / "moved"))
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace(str(flux), str(tmp_path / "gone")))
    refused(copy, r"^flux\.path=\S+gone: no such folder.*; or pass flux=FOLDER_OR_HUB_ID$")
    found = BifrostPipeline.from_pretrained(copy, flux=str(moved))
    assert found.config.flux["path"] == str(moved) and found.config.flux["image_size"] == 64
    assert np.array_equal(found("moon", output_type="np", **FEW).images, wanted)

    config = copy / "mllm" / "config.json"
    config.write_text(config.read_text().replace("builtin:tiny", str(tmp_path / "gone")))
    sealed(copy)
    refused(copy, r"^backbone\.path=\S+gone: no such folder.*; or pass backbone=FOLDER_OR_HUB_ID$", flux=str(moved))
    found = BifrostPipeline.from_pretrained(copy, flux=str(moved), backbone="builtin:tiny")
    assert np.array_equal(found("moon", output_type="np", **FEW).images, wanted)


def test_options_that_do_not_apply_are_one_line(folder: Path) -> None:
    refused(folder, "^variant does not apply to a pipeline of Bifrost; set the hub client's own", variant="fp16")
    refused(folder, "^device_map=balanced: give one device", device_map="balanced")
    refused(folder, "^dtype: give one for all parts", dtype={"vae": torch.float32})
    for wrong in ("bfloat16", torch.int8):
        refused(folder, "^dtype=.*: give torch.float32, torch.bfloat16 or torch.float16$", dtype=wrong)
    with pytest.raises(RunError, match="copy the folder of the pipeline"):
        BifrostPipeline.from_pretrained(folder).save_pretrained("elsewhere")


def test_export_names_a_local_base_and_refuses_what_does_not_fit(
    mllm: Path, controlnet: Path, flux: Path, place: Path, tmp_path: Path, caplog, capsys
) -> None:
    def export(*words: object) -> None:
        assert not main.app(["export", *map(str, words)], standalone_mode=False)

    out = tmp_path / "out"
    pipeline = ("--format", "pipeline", "--controlnet", controlnet)
    export(mllm, out, *pipeline)
    assert f"{out}: step 7 of {mllm} and step 7 of {controlnet} as a pipeline" in capsys.readouterr().out
    (line,) = [each.getMessage() for each in caplog.records if "a folder of this machine" in each.getMessage()]
    assert line.startswith(f"{flux}: ") and "pass flux=FOLDER_OR_HUB_ID" in line
    assert {t.dtype for t in load_file(out / "mllm" / "model.safetensors").values()} == {torch.float32}
    larger = load_recipe("tiny-mllm", ["data.image_size=224"])
    other = run_folders.save(tmp_path / "other", larger, 3)
    queries = load_recipe("tiny-controlnet", ["controlnet.bridge=queries", "ema=null"])
    bridge = run_folders.save(tmp_path / "bridge", queries, 4)
    for words, message in (
        ((mllm, out, *pipeline), "not empty, choose a new folder"),
        ((mllm, tmp_path / "new", "--format", "pipeline"), "give the stage-2 run too, with --controlnet RUN"),
        ((controlnet, tmp_path / "new", *pipeline), "is a controlnet run, expected a patch-latents run"),
        ((out / "mllm", tmp_path / "new", *pipeline), "is an export; give the run folder that it was made of"),
        ((other, tmp_path / "new", *pipeline), "8 x 8 latents and 8 x 8 FLUX tokens need 'none'"),
        ((mllm, tmp_path / "new", "--format", "pipeline", "--controlnet", bridge), "controlnet.bridge is queries"),
        ((mllm, tmp_path / "new", *pipeline, "--step", 7), "give the checkpoint's folder in place of the run"),
        ((mllm, tmp_path / "new", *pipeline, "--ema"), "leave it out; a pipeline has averaged weights"),
        ((mllm, tmp_path / "new", "--controlnet", controlnet), "--controlnet is for --format pipeline"),
    ):
        with pytest.raises(RunError, match=re.escape(message)) as caught:
            export(*words)
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pipeline_and_frozen_flux_from_the_hub_by_revision(
    folder: Path, mllm: Path, flux: Path, tmp_path: Path, monkeypatch
) -> None:
    """Both are downloaded; a pipeline exported where the FLUX is cached names its commit."""
    wanted = BifrostPipeline.from_pretrained(folder)("moon", output_type="np", **FEW).images
    files = {file.relative_to(flux).as_posix(): file.read_bytes() for file in flux.rglob("*") if file.is_file()}
    stored: dict[str, bytes] = {}
    with hub_server.hub({"some/flux": files, "my/pipeline": stored}) as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(model_hub, "_snapshots", {})
        run = run_folders.save(tmp_path / "run", load_recipe("tiny-controlnet", ["flux.path=some/flux", "ema=null"]), 2)
        export_pipeline(mllm, run, tmp_path / "out", torch.bfloat16)
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert (index["flux"]["path"], index["flux"]["revision"]) == ("some/flux", hub_server.COMMIT)
        assert f"`{hub_server.COMMIT}`" in (tmp_path / "out" / "README.md").read_text()
        out = tmp_path / "out"
        stored.update({f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()})
        found = BifrostPipeline.from_pretrained("my/pipeline", revision="main")
        assert np.array_equal(found("moon", output_type="np", **FEW).images, wanted)
        refused("my/pipeline", "pipeline.revision=v9 does not exist there", revision="v9")
        refused("some/flux", "is of a FluxPipeline, expected BifrostPipeline")
