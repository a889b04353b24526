"""`bifrost init`: the file loads as the recipe that it was made from, and documents every setting."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.recipes import Recipe, RecipeError, load_recipe, read_yaml, shipped_recipes
from bifrost.recipes.template import template
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError


@pytest.mark.parametrize("source", shipped_recipes())
def test_file_equals_the_shipped_recipe_with_another_name(source: str, tmp_path: Path) -> None:
    file = tmp_path / "cats.yaml"
    file.write_text(template(source, "cats", "/mine/*.tar", str(file)), encoding="utf-8")
    assert load_recipe(file) == load_recipe(source, ["name=cats", "data.shards=/mine/*.tar"])
    file.write_text(template(source, "007", None, str(file)), encoding="utf-8")
    shipped = load_recipe(source)
    assert load_recipe(file) == shipped.model_copy(update={"name": "007"})


@pytest.mark.parametrize("source", ["tiny-mllm", "flux-controlnet-256"])
def test_every_line_with_a_setting_can_be_uncommented(source: str, tmp_path: Path) -> None:
    text = template(source, "cats", None, "cats.yaml")
    whole = re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.M)
    (tmp_path / "cats.yaml").write_text(whole, encoding="utf-8")
    found, shipped = load_recipe(tmp_path / "cats.yaml"), load_recipe(source, ["name=cats"])
    assert found.model_copy(update={"ema": None}) == shipped.model_copy(update={"ema": None})
    other = {"patch-latents": {"flux", "controlnet"}, "controlnet": {"branch"}}[shipped.stage]
    assert Recipe.model_fields.keys() - other == read_yaml(whole).keys()


def test_comments_come_from_the_schema_and_the_recipe() -> None:
    text = " ".join(template("mllm-7b-256", "cats", None, "cats.yaml").replace("#", "").split())
    assert Recipe.model_fields["global_batch"].description in text
    for own in ("mllm-7b for 256 GPUs and more", "256 GPUs x 16", "Few large collectives"):  # the last its base's
        assert own in text


def test_init_prints_next_steps_and_keeps_existing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["init", "cats", "--from", "tiny-mllm", "--data", "shards/*.tar"])
    assert ended.exit_code == 0 and "bifrost train cats.yaml --ranks 2" in ended.output
    before = Path("cats.yaml").read_text()
    ended = CliRunner().invoke(app, ["init", "cats", "--from", "mllm-7b"])
    assert isinstance(ended.exception, RunError) and "cats.yaml: already exists" in str(ended.exception)
    assert Path("cats.yaml").read_text() == before
    assert CliRunner().invoke(app, ["init", "cats", "--from", "mllm-7b", "--out", "dogs.yaml"]).exit_code == 0


@pytest.mark.parametrize("source", ["tiny-mllm", "mllm-7b"])
def test_own_images_are_not_advised_into_the_folder_of_other_shards(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = CliRunner().invoke(app, ["init", "cats", "--from", source]).output
    shards = load_recipe("cats.yaml").data.shards
    assert f"ingest IMAGES cats-shards    # then set data.shards to cats-shards/*.tar; now it is {shards}" in printed
    printed = CliRunner().invoke(app, ["init", "dogs", "--from", source, "--data", "mine/*.tar"]).output
    assert "ingest" not in printed and "bifrost train dogs.yaml" in printed


@pytest.mark.parametrize("name", ["cats.yaml", "cats.YML"])
def test_a_file_name_as_the_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["init", name, "--from", "tiny-mllm"])
    assert isinstance(ended.exception, RunError) and str(ended.exception).endswith("give cats")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "source", "said"), [("cats", "mllm-8b", "mllm-7b"), ("my cats", "mllm-7b", "name")])
def test_invalid_arguments_are_one_line_and_write_nothing(
    name: str, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["init", name, "--from", source])
    assert isinstance(ended.exception, RecipeError) and said in str(ended.exception)
    assert "\n" not in str(ended.exception) and not list(tmp_path.iterdir())


def test_choices_are_in_the_help_and_the_error() -> None:
    printed = CliRunner().invoke(app, ["init", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in printed for name in shipped_recipes())
    ended = CliRunner().invoke(app, ["init", "cats"])
    assert isinstance(ended.exception, RunError) and all(name in str(ended.exception) for name in shipped_recipes())
