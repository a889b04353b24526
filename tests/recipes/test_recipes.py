"""Recipes: every shipped one loads and dry-runs with the published sizes; errors are named."""

import re
from fractions import Fraction
from typing import Any

import pytest
from pydantic import BaseModel

import ranked
from bifrost.recipes import Recipe, RecipeError, apply_overrides, load_recipe, shipped_recipes


def test_shipped() -> None:
    assert {"tiny-mllm", "mllm-3b", "mllm-7b"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_round_trip(name: str, tmp_path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shards_have_no_absolute_path(name: str) -> None:
    shards = load_recipe(name).data.shards
    assert not any(spec.startswith(("/", "~")) for spec in ([shards] if isinstance(shards, str) else shards))


@pytest.mark.parametrize("name", shipped_recipes())
def test_hub_models_are_pinned_to_a_commit(name: str) -> None:
    recipe = load_recipe(name)
    for model in (recipe.backbone, recipe.flux):
        if model is not None and not model.path.startswith("builtin:"):
            assert re.fullmatch("[0-9a-f]{40}", model.revision or ""), model.path


@pytest.mark.parametrize(
    ("name", "ranks", "trainable", "frozen"),
    [
        # Spec 7.1; frozen: the whole model without the 7B's output layer, which training does not need.
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
    assert f"{ranks} ranks x micro batch {recipe.micro_batch} x {passes} backward pass" in ended.out


def dry_run(arguments: list[str]) -> None:
    ranked.command(arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["unknown key stepz", "steps"]),
        ("data.worker=1", ["unknown key data.worker", "data.workers"]),
        ("lr=1e-3", ["unknown key lr; did you mean optimizer.lr?"]),
        ("data.lr=1e-3", ["unknown key data.lr; did you mean optimizer.lr?"]),
        ("path=x", ["did you mean backbone.path or flux.path?"]),
        ("data_shards=x", ["did you mean data.shards?"]),
        ("num_workers=2", ["did you mean data.workers?"]),
        ("ranks=2", ["unknown key ranks; the number of processes is the option --ranks N"]),
        ("batch_size=32", ["unknown key batch_size; did you mean global_batch (", "micro_batch ("]),
        ("optimizer.learning_rate=1", ["did you mean optimizer.lr?"]),
        ("ema.smoothing=1", ["unknown key ema.smoothing; known here: decay"]),
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
def test_errors_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", [override])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_error_of_the_whole_recipe_does_not_print_it() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", ["previews.every=5"])
    assert str(caught.value).endswith(
        "previews.every in stage patch-latents needs previews.controlnet to decode the latents"
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
def test_shards_need_no_yaml_quotes(shards: str) -> None:
    assert load_recipe("tiny-mllm", [f"data.shards={shards}"]).data.shards == shards


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1.e-3", 1e-3), (".5e-1", 0.05), ("3.0e-4", 3e-4), ("1e+0", 1), ("1", 1)],
)
def test_number_formats(written: str, value: float, tmp_path) -> None:
    assert load_recipe("tiny-mllm", [f"optimizer.lr={written}"]).optimizer.lr == value
    (tmp_path / "mine.yaml").write_text(f"extends: tiny-mllm\noptimizer: {{lr: {written}, betas: [0, {written}]}}\n")
    if value < 1:
        assert load_recipe(tmp_path / "mine.yaml").optimizer.betas == (0, value)


@pytest.mark.parametrize("written", ["100000", "1e5", "1E+5", "1.0e5", "100000.0"])
def test_whole_numbers(written: str) -> None:
    steps = load_recipe("tiny-mllm", [f"steps={written}"]).steps
    assert steps == 100_000 and isinstance(steps, int)


def test_quoted_numbers_are_text(tmp_path) -> None:
    for name in ("1e5", "7", "0.5", "2e-3"):
        recipe = load_recipe("tiny-mllm", [f"name='{name}'"])
        assert recipe.name == name
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_change_only_the_named_setting() -> None:
    """Two groups may be the same object through an anchor: an override changes only the one that it names."""
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


def test_recipe_extends_another(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("extends: tiny-mllm\nsteps: 7\noptimizer: {lr: 2e-3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\noptimizer: {warmup_steps: 3}\nema: null\n")
    mine, shipped = load_recipe(tmp_path / "mine.yaml", ["seed=5"]), load_recipe("tiny-mllm")
    assert (mine.name, mine.steps, mine.seed, mine.ema) == ("mine", 7, 5, None)
    changed = {"lr": 2e-3, "warmup_steps": 3}
    assert mine.optimizer == shipped.optimizer.model_copy(update=changed)
    assert mine.data == shipped.data
    assert "extends" not in mine.to_yaml()
    (tmp_path / "base.yaml").write_text("extends: mine.yaml\n")
    with pytest.raises(RecipeError, match=r"base.yaml: extends mine.yaml, which extends it in turn"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "base.yaml").write_text("extends: nothing\n")
    with pytest.raises(RecipeError, match="nothing: no such recipe"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "base.yaml").write_text("extends: [a, b]\n")
    with pytest.raises(RecipeError, match=r"base\.yaml: extends names one recipe"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError, match=r"backbone\.placement is for stage 1; .* flux\.placement\.vision_encoder"):
        load_recipe("flux-controlnet", ["backbone.placement=replicated"])


@pytest.mark.parametrize(("ranks", "micro", "passes"), [(1, 32, 2), (2, 32, 1), (4, 8, 2), (64, 1, 1)])
def test_passes_per_step(ranks: int, micro: int, passes: int) -> None:
    assert load_recipe("tiny-mllm", ["global_batch=64", f"micro_batch={micro}"]).split(ranks).passes == passes


def test_indivisible_batch_error_has_the_remedy() -> None:
    recipe = load_recipe("tiny-mllm", ["global_batch=60", "micro_batch=32"])
    with pytest.raises(ValueError, match="micro_batch=30"):
        recipe.split(2)
    with pytest.raises(ValueError, match="set global_batch=63, or use 6 ranks"):
        recipe.split(7)


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
        ("extends: tiny-mllm\nname: a\nsteps: 3\nname: b\n", "line 4: duplicate key name"),
        ("extends: tiny-mllm\noptimizer: {lr: 1e-3, clip: 1, lr: 2e-3}\n", "line 2: duplicate key lr"),
        ('extends: tiny-mllm\nsteps: "100"\n', "steps: input should be a valid integer (got '100'); leave the quotes"),
        (
            "extends: tiny-mllm\noptimizer: 3\n",
            "optimizer: is a group of settings (got 3); set one of them, such as optim",
        ),
        ("extends: nope\n", "mine.yaml: extends nope: no such recipe"),
        (
            "extends: tiny-controlnet\nflux: {pth: x}\n",
            "mine.yaml: unknown key flux.pth; did you mean flux.path?",
        ),
        ("stage: patch-latents\nbackbone: {pth: x}\n", "unknown key backbone.pth; did you mean backbone.path? (and "),
        ("stage: patch-latents\nstepz: 3\n", "mine.yaml: unknown key stepz; did you mean steps? (and "),
        ("", "mine.yaml: is empty; a recipe is a mapping"),
        ("just words", "mine.yaml: has no settings; a recipe is a mapping"),
    ],
)
def test_file_errors_are_one_line_with_the_place(tmp_path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_fraction_is_not_taken_for_a_quoted_number() -> None:
    with pytest.raises(RecipeError, match=r"steps: input should be a valid integer \(got 10\.5\)$"):
        load_recipe("tiny-mllm", ["steps=10.5"])


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
]


@pytest.mark.parametrize("key", PLACES)
def test_home_folder_is_expanded(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    recipe = "tiny-controlnet" if key.startswith("flux.") else "tiny-mllm"
    value: Any = load_recipe(recipe, [f"{key}=~/mine"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == "/somebody/mine"
    for written, said in (
        ("$SCRATCH/mine", r"\$SCRATCH/mine: \$SCRATCH is not expanded in a recipe; write the path out"),
        ("${HOME}/mine", r"\$\{HOME\} is not expanded"),
        ("~nobody-here/mine", "no home folder is known for ~nobody-here; write the path out"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe, [f"{key}={written}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.shards=", "data: no shards named; give a path such as data.shards="),
        ("data.shards=[]", "data.shards: no shards named"),
        ("data.shards=[a.tar, '']", "data.shards: no shards named"),
        ("data.shards=a{0..3.tar", "data.shards: a{0..3.tar: Unbalanced braces: 'a{0..3.tar'; write ranges as"),
        ("data.shards=['a.tar', 'b0..3}.tar']", "data.shards: b0..3}.tar: Unbalanced braces"),
    ],
)
def test_invalid_shard_names(override: str, said: str) -> None:
    """Refused when the recipe is loaded: in a dry run, a plan and the preflight."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", [override])
    assert str(caught.value).startswith(f"override {override!r}: {said}")


def test_home_folder_in_a_list_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("optimizer={name: lion, eps: 1e-6}", "override 'optimizer={name: lion, eps: 1e-6}': optimizer: eps: Lion has"),
        ("optimizer.momentum=0.9", "override 'optimizer.momentum=0.9': optimizer: momentum: only Muon has one; leave"),
        ("stage=controlnet", "override 'stage=controlnet': stage controlnet needs flux.path"),
        ("tracking.uri=http://a:b@h", "override 'tracking.uri=http://REDACTED@h': tracking.uri: the login in"),
        ("data.shards=https://a:b@h/c.tar", "override 'data.shards=https://REDACTED@h/c.tar': data.shards: the login"),
    ],
)
def test_error_of_an_override_names_the_override(tmp_path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", ["seed=1", override])
    assert str(caught.value).startswith(said)
    (tmp_path / "mine.yaml").write_text("extends: tiny-mllm\nsteps: 0\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: steps"):
        load_recipe(tmp_path / "mine.yaml", ["seed=1"])


def test_error_of_the_file_names_the_file(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny-mllm\nbranch: {mask_rate: {low: 0.9, high: 0.8}}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: branch.mask_rate: low \(0.9\) is above high"):
        load_recipe(tmp_path / "mine.yaml", ["branch.mask_rate.mean=0.9"])
    with pytest.raises(RecipeError, match=r"override 'branch.mask_rate.high=0.1': branch.mask_rate: low \(0.7\)"):
        load_recipe("tiny-mllm", ["branch.mask_rate.high=0.1", "branch.mask_rate.mean=0.9"])


@pytest.mark.parametrize("wrong", ["tiny_mllm", "tiny-mllm.yml", "mllm7b", "recipes/tiny-mlm.yaml"])
def test_misspelled_recipe_gets_a_suggestion(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean (recipes/)?(tiny-mllm|mllm-7b)(\.yaml)?\?"):
        load_recipe(wrong)


def test_recipe_without_its_ending_or_with_a_run_of_its_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "cats").mkdir(parents=True)
    (tmp_path / "runs" / "cats" / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"^cats: no such recipe; `bifrost resume runs/cats` continues the run"):
        load_recipe("cats")
    (tmp_path / "cats.yaml").touch()
    for wrong in ("cats", "cat", "cats.yml", "cat.yaml"):
        with pytest.raises(RecipeError, match=r"no such recipe; did you mean cats\.yaml\?"):
            load_recipe(wrong)


def test_folder_is_not_a_recipe(tmp_path) -> None:
    with pytest.raises(RecipeError, match="is a folder; name a recipe file"):
        load_recipe(tmp_path)


def test_a_setting_that_is_gone_is_left_out_or_refused() -> None:
    assert load_recipe("tiny-mllm", ["zero.quantized_gradients=false"]) == load_recipe("tiny-mllm")
    with pytest.raises(RecipeError, match=r"zero.*quantized_gradients is no longer a setting: .*; leave it out"):
        load_recipe("tiny-mllm", ["zero.quantized_gradients=true"])


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("tiny-mllm", "controlnet.double=2", "controlnet.double has no effect in stage patch-latents; leave it out"),
        ("tiny-mllm", "flux.guidance=2", "flux.guidance has no effect in stage patch-latents; leave it out"),
        (
            "tiny-controlnet",
            "branch.positions=mrope",
            "branch.positions has no effect in stage controlnet",
        ),
        ("tiny-mllm", "tracking.uri=foo", "tracking.uri: foo: names no tracking server or database; give http://"),
        ("tiny-mllm", "tracking.uri=file:///runs", "tracking.uri: file:///runs: names no tracking server or database"),
    ],
)
def test_settings_without_effect_are_refused(name: str, override: str, said: str, tmp_path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, [override])
    assert str(caught.value).startswith(f"override {override!r}: {said}")
    if override == "controlnet.double=2":  # a run of an earlier version may have it
        assert load_recipe(name, [override], stored=True).controlnet.double == 2
    whole = tmp_path / "whole.yaml"  # every setting of the other stage, at its default
    whole.write_text(load_recipe(name).to_yaml())
    assert load_recipe(whole) == load_recipe(name)


def test_stage_1_reads_of_flux_what_vae_targets_need(tmp_path) -> None:
    given = ["branch.targets=vae", "flux.path=x", "flux.image_size=64"]
    whole = tmp_path / "whole.yaml"
    whole.write_text(load_recipe("tiny-mllm", given).to_yaml())
    assert load_recipe(whole) == load_recipe("tiny-mllm", given)
    for settings in ([*given, "flux.guidance=2"], given[1:]):
        with pytest.raises(RecipeError, match=r"flux\.\w+ has no effect in stage patch-latents; leave it out"):
            load_recipe("tiny-mllm", settings)


SOURCES = "data.sources=[{name: a, shards: x/*.tar, weight: 0.7}, {name: b, shards: [y.tar, z.tar], weight: 0.3}]"


def test_sources() -> None:
    recipe = load_recipe("tiny-mllm", ["data.shards=null", SOURCES])
    assert recipe.data.named == ["x/*.tar", "y.tar", "z.tar"]
    assert recipe.data.weights([5, 6]) == [Fraction(7, 10), Fraction(3, 10)]
    repeated = load_recipe("tiny-mllm", ["data.shards=null", "data.sources=[{name: a, shards: x, repeats: 1.5}]"])
    assert repeated.data.weights([5]) == [Fraction(15, 2)]
    assert load_recipe("tiny-mllm").data.named == ["demo/train-*.tar"]


def test_scheduled_weights() -> None:
    scheduled = SOURCES.replace("weight: 0.7", "weight: {4: 0.1, 0: 0.7}").replace(
        "weight: 0.3", "weight: {9: 0, 0: 1}"
    )
    data = load_recipe("tiny-mllm", ["data.shards=null", scheduled]).data
    assert data.changes == [0, 4, 9]
    wanted = {0: ("7/10", 1), 3: ("7/10", 1), 4: ("1/10", 1), 8: ("1/10", 1), 9: ("1/10", 0), 99: ("1/10", 0)}
    assert {batch: data.weights([5, 6], batch) for batch in wanted} == {
        batch: [Fraction(each) for each in pair] for batch, pair in wanted.items()
    }
    assert load_recipe("tiny-mllm", ["data.shards=null", SOURCES]).data.changes == [0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SOURCES], "data: shards and sources exclude each other; set one of them to null"),
        (["data.shards=null"], "data: no shards named; give a path such as"),
        (["data.shards=null", "data.sources=[]"], "data.sources: "),
        (["data.shards=null", SOURCES.replace("name: b", "name: a")], "sources: a is the name of 2 of them"),
        (["data.shards=null", SOURCES.replace(", weight: 0.3", "")], "give every one a weight and none repeats"),
        (["data.shards=null", SOURCES.replace("weight: 0.3", "repeats: 2")], "give every one a weight"),
        (["data.shards=null", SOURCES.replace("weight: 0.3", "weight: 0")], r"data\.sources\.1\.weight: "),
        (["data.shards=null", SOURCES.replace("weight: 0.3", "weight: {5: 1}")], "numbers of global batches, 0 first"),
        (["data.shards=null", SOURCES.replace("0.3", "{0: -1}")], r"sources\.1\.weight: a schedule .* at least 0"),
        (
            ["data.shards=null", SOURCES.replace("0.3", "{0: 1, 7: 0}").replace("0.7", "{0: 1, 3: 0}")],
            "from global batch 7 on, all weights are 0",
        ),
        (["data.shards=null", SOURCES.replace("name: b", "name: a b")], "'a b' is not a name of a source"),
        (["data.shards=null", SOURCES.replace("weight: 0.3", "wieght: 0.3")], r"did you mean data\.sources\.1\.weight"),
    ],
)
def test_sources_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe("tiny-mllm", overrides)
    assert "\n" not in str(refused.value)


def test_captions(tmp_path) -> None:
    """Extensions with dots stay keys, also in a stored recipe."""
    recipe = load_recipe("tiny-mllm", ["data.captions={txt: 3, a.short.txt: 0.5}"])
    assert recipe.data.captions == {"txt": 3, "a.short.txt": 0.5}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml", stored=True).data.captions == recipe.data.captions
    sources = SOURCES.replace("weight: 0.3", "weight: 0.3, captions: {long.txt: 1}, caption_dropout: 0.5")
    mixed = load_recipe("tiny-mllm", ["data.shards=null", "data.captions={txt: 1, short.txt: 1}", sources]).data
    assert mixed.caption_members == {"txt", "short.txt", "long.txt"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.captions={}", r"data\.captions: no member named; give one such as \{txt: 1\}, or null for KEY\.txt"),
        ("data.captions={.short.txt: 1}", r"'\.short\.txt' is not an extension; of KEY\.short\.txt it is short\.txt"),
        ("data.captions={Short.txt: 1}", "in lower case"),
        ("data.captions={txt: 0}", r"data\.captions\.txt: input should be greater than 0"),
        ("data.captions=[txt]", r"data\.captions: "),
    ],
)
def test_captions_that_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe("tiny-mllm", [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "setting", "word"),
    [
        ("mllm-7b", "branch.targets=pca", "data.buckets: branch.targets=pca is for squares of one size"),
        ("flux-controlnet", "controlnet.bridge=queries", "data.buckets: controlnet.bridge=queries is for squares"),
        ("flux-controlnet", "data.buckets.ratios=[4:3]", "243 is not a ratio; write width and height such as 4x3"),
        ("flux-controlnet", "data.buckets.max_upscale=0.5", "data.buckets.max_upscale"),
        ("flux-controlnet", "data.buckets.ratios=[]", "data.buckets.ratios"),
    ],
)
def test_buckets_are_refused_where_squares_are_needed(recipe: str, setting: str, word: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, ["data.buckets={ratios: [1x1, 4x3]}", setting])
    assert word in str(refused.value)


def test_buckets_allow_caches() -> None:
    cached = [f"flux.placement.{part}=cached" for part in ("vae", "text", "vision_encoder")]
    recipe = load_recipe("flux-controlnet", ["data.buckets={ratios: [1x1, '4:3']}", *cached])
    assert recipe.data.buckets is not None
    assert recipe.data.buckets.numbers == [(1, 1), (4, 3)]
