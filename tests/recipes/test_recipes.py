"""Recipes: every shipped one loads and dry-runs with the published sizes; mistakes are named."""

import re
from typing import Any

import pytest
from pydantic import BaseModel

import ranked
from bifrost.recipes import Recipe, RecipeError, apply_overrides, load_recipe, shipped_recipes, to_yaml


def test_shipped() -> None:
    assert {"tiny-mllm", "mllm-3b", "mllm-7b"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_loads_and_survives_a_round_trip(name: str, tmp_path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_nothing_assumes_a_place(name: str) -> None:
    shards = load_recipe(name).data.shards
    assert not any(spec.startswith(("/", "~")) for spec in ([shards] if isinstance(shards, str) else shards))


@pytest.mark.parametrize("name", shipped_recipes())
def test_models_of_the_hub_are_those_of_one_commit(name: str) -> None:
    recipe = load_recipe(name)
    for model in (recipe.backbone, recipe.flux):
        if model is not None and not model.path.startswith("builtin:"):
            assert re.fullmatch("[0-9a-f]{40}", model.revision or ""), model.path


@pytest.mark.parametrize(
    ("name", "ranks", "trainable", "frozen"),
    [
        # Spec 7.1; frozen: the whole model less the 7B's output layer, which training does not need.
        ("mllm-7b", 64, 6_539_391_488, 8_292_166_656 - 544_997_376),
        ("mllm-3b", 32, 2_779_496_448, 3_754_622_976),
    ],
)
def test_dry_run_counts_parameters_and_batches(name: str, ranks: int, trainable: int, frozen: int) -> None:
    (ended,) = ranked.run(dry_run, 1, ["train", name, "--ranks", str(ranks), "--dry-run", "steps=7"])
    assert ended.code == 0, ended.err
    assert f"{trainable:,}" in ended.out
    assert f"{frozen:,}" in ended.out
    assert "steps: 7" in ended.out
    assert '"stage": 3' in ended.out
    recipe = load_recipe(name)
    passes = recipe.global_batch // (ranks * recipe.micro_batch)
    assert f"{ranks} ranks x micro batch {recipe.micro_batch} x {passes} backward passes" in ended.out


def dry_run(arguments: list[str]) -> None:
    ranked.command(arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["unknown key stepz", "steps"]),
        ("data.worker=1", ["unknown key data.worker", "data.workers"]),
        ("data=3", ["data", "got 3"]),
        ("steps=0", ["steps", "greater than or equal to 1"]),
        ("branch.mask_rate.low=1.5", ["branch.mask_rate.low"]),
        ("branch.mask_rate.high=0.5", ["low (0.7) is above high (0.5)"]),
        ("name=../elsewhere", ["name"]),
        ("seed", ["key.path=value"]),
        ("name.deep=1", ["name is not a group"]),
        ("zero.stage=2", ["zero.stage"]),
        ("checkpoint.every=yes", ["checkpoint.every", "valid integer", "got True"]),
        ("data.workers=true", ["data.workers", "valid integer", "got True"]),
        ("watchdog.step_timeout_s=on", ["watchdog.step_timeout_s", "valid number", "got True"]),
        ("steps='7'", ["steps", "valid integer", "got '7'"]),
        ("steps=7.5", ["steps", "valid integer", "got 7.5"]),
        ("optimizer.lr='3e-4'", ["optimizer.lr", "valid number", "got '3e-4'"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite"]),
        ("branch.mask_rate.mean=.nan", ["branch.mask_rate.mean", "finite"]),
        ("zero.overlap_comm=1", ["zero.overlap_comm", "valid boolean", "got 1"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1", "less than 1", "got 1.5"]),
        ("optimizer.betas=[0.9, true]", ["optimizer.betas.1", "valid number", "got True"]),
        ("optimizer.betas=[0.9", ["optimizer.betas", "got '[0.9'"]),
        ("branch.mask_rate={low: 0, high: 0}", ["branch.mask_rate.high", "greater than 0"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", [override])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_mistake_of_the_whole_does_not_print_the_whole() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", ["previews.every=5"])
    assert str(caught.value).endswith(
        "previews.every in stage patch-latents needs previews.controlnet, which paints the latents"
    )


@pytest.mark.parametrize(
    "shards",
    [
        "*.tar",
        "*a.tar",
        "{0..3}.tar",
        "{a,b}-[0-9].tar",
        "[a-f]*.tar",
        "/data/train-{00000..00099}.tar",
        "s3://b/*.tar",
    ],
)
def test_shards_need_no_quotes_of_yaml(shards: str) -> None:
    assert load_recipe("tiny-mllm", [f"data.shards={shards}"]).data.shards == shards


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1.e-3", 1e-3), (".5e-1", 0.05), ("3.0e-4", 3e-4), ("1e+0", 1), ("1", 1)],
)
def test_numbers_as_people_write_them(written: str, value: float, tmp_path) -> None:
    assert load_recipe("tiny-mllm", [f"optimizer.lr={written}"]).optimizer.lr == value
    (tmp_path / "mine.yaml").write_text(f"extends: tiny-mllm\noptimizer: {{lr: {written}, betas: [0, {written}]}}\n")
    if value < 1:
        assert load_recipe(tmp_path / "mine.yaml").optimizer.betas == (0, value)


@pytest.mark.parametrize("written", ["100000", "1e5", "1E+5", "1.0e5", "100000.0"])
def test_whole_numbers(written: str) -> None:
    steps = load_recipe("tiny-mllm", [f"steps={written}"]).steps
    assert steps == 100_000 and isinstance(steps, int)


def test_text_that_looks_like_a_number_stays_text(tmp_path) -> None:
    for name in ("1e5", "7", "0.5", "2e-3"):
        recipe = load_recipe("tiny-mllm", [f"name='{name}'"])
        assert recipe.name == name
        (tmp_path / "again.yaml").write_text(to_yaml(recipe))
        assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_leave_what_they_do_not_name() -> None:
    """An anchor makes two groups one: an override is of the one that it names."""
    tree = {"a": {"x": 1, "y": {"z": 2}}}
    tree["b"] = tree["a"]
    assert apply_overrides(tree, ["a.y.z=3", "c.d=4"]) == {"a": {"x": 1, "y": {"z": 3}}, "b": tree["b"], "c": {"d": 4}}
    assert tree == {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 1, "y": {"z": 2}}}


def test_overrides_are_yaml() -> None:
    recipe = load_recipe(
        "tiny-mllm", ["optimizer.lr=3e-4", "ema=null", "data.shards=[a.tar, b.tar]", "tracking.uri=http://x:5000"]
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.ema is None
    assert recipe.data.shards == ["a.tar", "b.tar"]
    assert recipe.tracking.uri == "http://x:5000"


def test_unreadable_files(tmp_path) -> None:
    with pytest.raises(RecipeError, match="no such recipe; shipped ones are"):
        load_recipe("nothing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1,")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "torn.yaml")


def test_a_recipe_extends_another(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("extends: tiny-mllm\nsteps: 7\noptimizer: {lr: 2e-3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\noptimizer: {warmup_steps: 3}\nema: null\n")
    mine, shipped = load_recipe(tmp_path / "mine.yaml", ["seed=5"]), load_recipe("tiny-mllm")
    assert (mine.name, mine.steps, mine.seed, mine.ema) == ("mine", 7, 5, None)
    changed = {"lr": 2e-3, "warmup_steps": 3}
    assert mine.optimizer == shipped.optimizer.model_copy(update=changed)
    assert mine.data == shipped.data
    assert "extends" not in to_yaml(mine)
    (tmp_path / "base.yaml").write_text("extends: mine.yaml\n")
    with pytest.raises(RecipeError, match=r"base.yaml: extends mine.yaml, which extends it in turn"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "base.yaml").write_text("extends: nothing\n")
    with pytest.raises(RecipeError, match="nothing: no such recipe"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "base.yaml").write_text("extends: [a, b]\n")
    with pytest.raises(RecipeError, match=r"base\.yaml: extends names one recipe"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError, match=r"backbone\.placement is stage 1's; .* set flux\.placement\.vision_encoder"):
        load_recipe("flux-controlnet", ["backbone.placement=replicated"])


@pytest.mark.parametrize(("ranks", "micro", "passes"), [(1, 32, 2), (2, 32, 1), (4, 8, 2), (64, 1, 1)])
def test_accumulation(ranks: int, micro: int, passes: int) -> None:
    assert load_recipe("tiny-mllm", ["global_batch=64", f"micro_batch={micro}"]).accumulation(ranks) == passes


def test_a_batch_that_does_not_divide_says_what_would() -> None:
    recipe = load_recipe("tiny-mllm", ["global_batch=60", "micro_batch=32"])
    with pytest.raises(ValueError, match="micro_batch=30"):
        recipe.accumulation(2)
    with pytest.raises(ValueError, match="multiple of 7, such as 63"):
        recipe.accumulation(7)


def test_every_setting_is_documented() -> None:
    def undocumented(section: type[BaseModel], path: str) -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
            groups = [t for t in inner if issubclass(t, BaseModel)]
            missing += [m for group in groups for m in undocumented(group, f"{path}{name}.")]
            if not groups and not field.description:
                missing.append(path + name)
        return missing

    assert undocumented(Recipe, "") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: patch-latents\n\tname: x\n", "line 2: found character '\\t' that cannot start any token; indent with"),
        ("stage: patch-latents\nname: [x\n", "line 3: expected ',' or ']'"),
        ("extends: tiny-mllm\nname: a\nsteps: 3\nname: b\n", "line 4: the key name comes twice"),
        ("extends: tiny-mllm\noptimizer: {lr: 1e-3, clip: 1, lr: 2e-3}\n", "line 2: the key lr comes twice"),
        ('extends: tiny-mllm\nsteps: "100"\n', "steps: input should be a valid integer (got '100'); leave the quotes"),
        (
            "extends: tiny-mllm\noptimizer: 3\n",
            "optimizer: is a group of settings (got 3); set one of them, such as optim",
        ),
        ("extends: nope\n", "mine.yaml: extends nope: no such recipe"),
        ("", "mine.yaml: is empty; a recipe is a mapping"),
        ("just words", "mine.yaml: has none; a recipe is a mapping"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_the_place(tmp_path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_other_systems(tmp_path) -> None:
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbfextends: tiny-mllm\r\nname: mine\r\n")
    assert load_recipe(tmp_path / "windows.yaml").name == "mine"
    (tmp_path / "utf16.yaml").write_text("extends: tiny-mllm\n", encoding="utf-16")
    with pytest.raises(RecipeError, match=r"utf16\.yaml: is not UTF-8 text"):
        load_recipe(tmp_path / "utf16.yaml")


PLACES = [
    "runs_dir",
    "init_from",
    "data.shards",
    "backbone.path",
    "flux.path",
    "checkpoint.local",
    "previews.controlnet",
    "previews.flux",
    "tracking.uri",
]


@pytest.mark.parametrize("key", PLACES)
def test_the_home_folder_is_no_folder_called_tilde(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    value: Any = load_recipe("tiny-mllm", [f"{key}=~/mine"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == "/somebody/mine"
    for written, said in (
        ("$SCRATCH/mine", r"\$SCRATCH/mine: \$SCRATCH is not expanded in a recipe; write the path out"),
        ("${HOME}/mine", r"\$\{HOME\} is not expanded"),
        ("~nobody-here/mine", "no home folder is known for ~nobody-here; write the path out"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe("tiny-mllm", [f"{key}={written}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.shards=", "data.shards: no shards named; give a path such as"),
        ("data.shards=[]", "data.shards: no shards named"),
        ("data.shards=[a.tar, '']", "data.shards: no shards named"),
        ("data.shards=a{0..3.tar", "data.shards: a{0..3.tar: Unbalanced braces: 'a{0..3.tar'; write ranges as"),
        ("data.shards=['a.tar', 'b0..3}.tar']", "data.shards: b0..3}.tar: Unbalanced braces"),
    ],
)
def test_shards_that_cannot_be_named(override: str, said: str) -> None:
    """At once, whoever loads the recipe: a dry run, a plan, the preflight."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", [override])
    assert str(caught.value).startswith(f"override {override!r}: {said}")


def test_the_home_folder_in_a_list_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    recipe = load_recipe("tiny-mllm", ["data.shards=[~/a.tar, s3://b/~/c.tar, d/~e.tar]"])
    assert recipe.data.shards == ["/somebody/a.tar", "s3://b/~/c.tar", "d/~e.tar"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=-1", "override 'optimizer.lr=-1': optimizer.lr: input should be greater than 0"),
        ("optimzer.lr=1", "override 'optimzer.lr=1': unknown key optimzer; did you mean optimizer?"),
        ("ema={decay: 2}", "override 'ema={decay: 2}': ema.decay: input should be less than 1"),
        ("steps=0", "override 'steps=0': steps: "),
        ("stage=controlnet", "override 'stage=controlnet': stage controlnet needs flux.path"),
        ("tracking.uri=http://a:b@h", "override 'tracking.uri=http://REDACTED@h': tracking.uri: the login in"),
        ("data.shards=https://a:b@h/c.tar", "override 'data.shards=https://REDACTED@h/c.tar': data.shards: the login"),
    ],
)
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", ["seed=1", override])
    assert str(caught.value).startswith(said)
    (tmp_path / "mine.yaml").write_text("extends: tiny-mllm\nsteps: 0\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: steps"):
        load_recipe(tmp_path / "mine.yaml", ["seed=1"])


def test_a_mistake_in_the_file_is_not_blamed_on_an_override_beside_it(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny-mllm\nbranch: {mask_rate: {low: 0.9, high: 0.8}}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: branch.mask_rate: low \(0.9\) is above high"):
        load_recipe(tmp_path / "mine.yaml", ["branch.mask_rate.mean=0.9"])
    with pytest.raises(RecipeError, match=r"override 'branch.mask_rate.high=0.1': branch.mask_rate: low \(0.7\)"):
        load_recipe("tiny-mllm", ["branch.mask_rate.high=0.1", "branch.mask_rate.mean=0.9"])


@pytest.mark.parametrize("wrong", ["tiny_mllm", "tiny-mllm.yml", "mllm7b", "recipes/tiny-mlm.yaml"])
def test_a_name_with_a_slip_gets_the_nearest(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean (tiny-mllm|mllm-7b)\?"):
        load_recipe(wrong)


def test_a_folder_is_called_one(tmp_path) -> None:
    with pytest.raises(RecipeError, match="is a folder; name a recipe file"):
        load_recipe(tmp_path)
