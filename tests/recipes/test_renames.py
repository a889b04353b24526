"""Settings of earlier versions: refused in new recipes, read in the recipe of an existing run."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import first_version
from bifrost.recipes import RecipeError, load_recipe, with_new_names
from bifrost.slurm.errors import SlurmError
from bifrost.slurm.site import COPY, load_site

RENAMED = [
    ("data.block=4", "data.shuffle_window"),
    ("data={shards: x, block: 4}", "data.shuffle_window"),
    ("data.max_bad_share=0.1", "data.max_bad_fraction"),
    ("flux.placement.tower=replicated", "flux.placement.vision_encoder"),
    ("kernels.provider=reference", "kernels.head_backend"),
    ("samples.every=5", "previews"),
    ("samples=null", "previews"),
    ("watchdog.save_s=9", "watchdog.save_timeout_s"),
    ("watchdog.start_s=9", "watchdog.startup_timeout_s"),
    ("watchdog.step_s=9", "watchdog.step_timeout_s"),
    ("zero.overlap=true", "zero.overlap_comm"),
]


@pytest.mark.parametrize(("override", "new"), RENAMED)
def test_an_old_key_is_refused_with_the_new_one(override: str, new: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    old = "samples" if new == "previews" else "data.block" if key == "data" else key
    words = f"{re.escape(old)} is now {re.escape(new)}"
    with pytest.raises(RecipeError, match=f"^override .*{words}"):
        load_recipe("tiny-controlnet", [override])
    tree: Any = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": "tiny-controlnet", **tree}))
    with pytest.raises(RecipeError, match=f"^{re.escape(str(file))}: {words}") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-mllm", "tiny-controlnet"])
def test_the_recipe_that_a_run_stored_is_read(name: str) -> None:
    file = first_version.FOLDER / name / "recipe.yaml"
    written = yaml.safe_load(file.read_text())
    with pytest.raises(RecipeError, match="is now"):
        load_recipe(file)
    recipe = load_recipe(file, ["optimizer.lr=2e-3"], stored=True)
    assert (recipe.data.shuffle_window, recipe.data.max_bad_fraction) == (2, 0.02)
    assert (recipe.watchdog.step_timeout_s, recipe.optimizer.lr) == (500, 2e-3)
    if name == "tiny-controlnet":
        assert recipe.flux and recipe.flux.placement.vision_encoder == "replicated"
        assert (recipe.previews.every, recipe.previews.count) == (2, 2)
    # Nothing is lost, and the names written out in the tests' support are those of the first version.
    now = yaml.safe_load(load_recipe(file, stored=True).to_yaml())
    assert written["zero"].pop("quantized_gradients") is False, "the one value that the removed setting had"
    assert first_version.recipe(now) == written
    assert with_new_names(now) == now
    with pytest.raises(RecipeError, match=r"override .*data\.block is now"):
        load_recipe(file, ["data.block=4"], stored=True)


def test_names_are_changed_in_a_copy_and_what_has_no_settings_stays() -> None:
    tree = {"data": {"block": 3}, "zero": None, "samples": {"every": 1}, "previews": {"every": 2}}
    assert with_new_names(tree) == {"data": {"shuffle_window": 3}, "zero": None, "previews": {"every": 2}}
    assert tree["data"] == {"block": 3} and "samples" in tree


@pytest.mark.parametrize(
    ("old", "new", "value"), [("offences", "bad_node_threshold", 3), ("offenders", "bad_node_file", "/b")]
)
def test_a_site_file_is_refused_and_a_runs_copy_of_it_read(
    old: str, new: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site.yaml"
    monkeypatch.setenv("BIFROST_SITE", str(file))
    file.write_text(yaml.safe_dump({old: value}))
    (tmp_path / COPY).parent.mkdir()
    (tmp_path / COPY).write_text(yaml.safe_dump({old: value}))
    assert getattr(load_site(tmp_path), new) == value
    with pytest.raises(SlurmError, match=f"^{re.escape(str(file))}: {old} is now {new}"):
        load_site()
