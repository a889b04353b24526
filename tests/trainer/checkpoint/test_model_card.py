"""A model card names the bases and their licences as the bases' own cards do, and no folder of this machine."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard

from bifrost import __version__
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.checkpoint.model_card import card
from bifrost.trainer.checkpoint.reader import CheckpointReader

STATE = {"progress": {"samples": 128_000, "digest": "2:abcdef"}, "data": "shards-of-it", "backbone": "base-of-it"}


def written(tmp_path: Path, recipe: Recipe, with_base: bool = True, **state: Any) -> ModelCard:
    """The card as the hub's own library reads it."""
    reader = cast(
        CheckpointReader, SimpleNamespace(step=2000, state={**STATE, "recipe": recipe.model_dump(mode="json"), **state})
    )
    return ModelCard(card(tmp_path, reader, "ema", "bfloat16", with_base))


@pytest.mark.parametrize(
    ("name", "licence", "licence_name", "link"),
    [
        ("mllm-7b", "apache-2.0", None, "apache.org/licenses/LICENSE-2.0"),
        ("mllm-3b", "other", "qwen-research", "huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"),
        (
            "flux-controlnet",
            "other",
            "flux-1-dev-non-commercial-license",
            "huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        ),
        ("tiny-mllm", "cc-by-sa-4.0", None, "openmoji.org"),
        ("tiny-controlnet", "cc-by-sa-4.0", None, "openmoji.org"),
    ],
)
def test_shipped_recipes(tmp_path: Path, name: str, licence: str, licence_name: str | None, link: str) -> None:
    recipe = load_recipe(name, ["data.shards=/secret/place/*.tar"] if "tiny" not in name else [])
    found = written(tmp_path, recipe)
    assert (found.data.license, found.data.license_name) == (licence, licence_name)
    assert link in found.text
    assert f"`{recipe.backbone.path}`" in found.text
    assert not recipe.flux or f"`{recipe.flux.path}`" in found.text
    for text in ("2,000", "128,000", "`2:abcdef`", "`shards-of-it`", "`base-of-it`", "EMA", f"bifrost {__version__}"):
        assert text in found.text
    (settings,) = re.findall(r"```yaml\n(.*?)```", found.text, flags=re.S)
    assert Recipe.model_validate(yaml.safe_load(settings)) == recipe


def test_bases_on_the_hub_are_metadata(tmp_path: Path) -> None:
    recipe = load_recipe("flux-controlnet", ["data.shards=x/*.tar"])
    assert recipe.flux
    assert written(tmp_path, recipe).data.base_model == [recipe.flux.path, recipe.backbone.path]
    assert written(tmp_path, load_recipe("tiny-mllm")).data.base_model is None


def test_a_local_base_is_named_without_its_folder_and_its_own_card_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "private" / "Their-Model"
    base.mkdir(parents=True)
    recipe = load_recipe("mllm-7b", [f"backbone.path={base}", "data.shards=x/*.tar"])

    def licences() -> tuple[ModelCard, str]:
        found = written(tmp_path, recipe)
        section = found.text.split("## Licences")[1].split("## Recipe")[0]
        assert "`Their-Model`" in section and "private" not in section
        assert found.data.base_model is None
        return found, section

    found, section = licences()
    assert "unknown" in section and found.data.license is None
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\nlicense_link: https://x.org/l\n---\n")
    found, section = licences()
    assert "theirs, https://x.org/l" in section
    assert (found.data.license, found.data.license_name) == ("other", "theirs")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licences()[0].data.license == "mit"
    for damaged in (b"---\nlicense: [\n---\n", b"\xff\xfe---", b"---\n- license\n---\n"):
        caplog.clear()
        (base / "README.md").write_bytes(damaged)
        assert "unknown" in licences()[1]
        assert any("cannot be read" in one.getMessage() for one in caplog.records)


def test_secrets_in_addresses_are_hidden(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-mllm", ["data.shards=https://x.org/a.tar?X-Amz-Signature=secret123"])
    assert "secret123" not in written(tmp_path, recipe).content


def test_a_run_that_recorded_less_still_gets_a_card(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{half")
    assert "unknown" in written(tmp_path, load_recipe("tiny-mllm"), progress={}, data="", backbone="").text
