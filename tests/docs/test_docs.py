"""The documents are correct: their commands run, their links have targets, their tables are those of the code.

`sh` blocks are commands. Those that need a cluster, a network or an hour are handled in `check`, which
runs a substitute.
"""

import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

import bifrost as bifrost_package
import ranked
import runs
import small_world
from bifrost.kernels.bench.arguments import parser, read_arguments
from bifrost.recipes import shipped_recipes
from bifrost.recipes.suite import Suite
from bifrost.trainer.ablation.table import Row
from bifrost.trainer.phantom import device

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
SMALL = ("steps=2", "global_batch=8", "micro_batch=2", "log_every=1", "data.workers=0", "tracking.enabled=false")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[page], flags=re.M | re.S)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return list(dict.fromkeys(lines))


def recipe_of_make(*words: str) -> list[str]:
    """The commands of `make WORDS`, without variables and the prefix of the virtual environment."""
    shown = subprocess.run(["make", "-n", "-B", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return [re.sub(r"^(env \w+=\w+ )?\.venv/bin/", "", line) for line in shown.stdout.splitlines()]


def in_folder(folder: str, arguments: list[str]) -> None:
    """The `bifrost` command in `folder`; runs in a separate process."""
    os.chdir(folder)
    ranked.command(arguments)


@functools.cache
def bifrost(folder: Path, *arguments: str) -> str:
    """Run a documented command in `folder`, reduced if it trains; returns its output."""
    if arguments[:2] == ("kernels", "check"):
        return ""  # takes a minute: tests/kernels/test_compile_check.py runs it
    if arguments[:2] == ("kernels", "bench"):  # tests/kernels/test_bench.py runs it
        read_arguments(arguments[2:], torch.device("cuda"))
        return ""
    if arguments[0] == "ablate":  # tests/trainer/ablation trains and scores a suite
        arguments = (*arguments, *(() if "--dry-run" in arguments else ("--dry-run",)))
    if "--check" in arguments and (reason := device.unavailable()):
        assert re.search(r"g\+\+|CUDA", reason)
        return ""
    if (arguments[0] == "train" and "--dry-run" not in arguments) or arguments[:2] == ("kernels", "profile"):
        return train(folder, list(arguments))
    # In this process: imports take longest.
    from bifrost.trainer.cli.main import app

    smaller = {"--step": "2", "--samples": "4", "--flux-steps": "2"}
    words = [smaller.get(before, word) for before, word in zip(("", *arguments), arguments, strict=False)]
    if words[0] == "eval":  # the shards here are small and have no held-out ones
        words = [word for word in words if "heldout" not in word] + ["--samples", "4"]
        if "--ranks" in words:  # test_demo.py starts them
            del words[(at := words.index("--ranks")) : at + 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("bifrost.data.demo.TRAINING_EDITS", 64)
        patch.setattr("bifrost.data.demo.HELD_OUT_EDITS", 4)
        ended = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ended.exit_code == 0, f"bifrost {shlex.join(words)}\n{ended.output}"
    return ended.output


def train(folder: Path, arguments: list[str]) -> str:
    ranks = 1
    if "--ranks" in arguments:
        at = arguments.index("--ranks")
        ranks = int(arguments[at + 1])
        del arguments[at : at + 2]
    ended = ranked.run(in_folder, ranks, str(folder), [*arguments, *SMALL])
    assert [rank.code for rank in ended] == [0] * ranks, f"bifrost {shlex.join(arguments)}\n{ended[0].err}"
    return ended[0].out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `make demo` with a few steps on few scenes; test_demo.py trains for longer."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    lines = "\n".join(recipe_of_make("demo")).replace("\\\n", " ").splitlines()
    make, *trains, evaluate = (shlex.split(line)[1:] for line in lines if line.startswith("bifrost "))
    assert make == ["data", "demo", "demo"]
    small_world.write(folder / "demo")
    own_images(folder / "photos")
    own_pairs(folder / "rooms")
    for train in trains:
        bifrost(folder, *train)
    assert evaluate[0] == "eval" and {"runs/tiny-mllm", "runs/tiny-controlnet"} <= set(evaluate)
    bifrost(folder, *evaluate)
    return folder


def own_images(photos: Path) -> None:
    """The inputs of the page on own images: images with texts next to them, and a table; it shows their first lines."""
    photos.mkdir()
    texts, table = (block for block in blocks(ROOT / "docs" / "own-images.md", "text") if "cat-01" in block)
    names = [f"cat-{number:02}" for number in range(1, 13)]
    captions = {name: f"a cat, number {number}" for number, name in enumerate(names)}
    captions |= {name: text for name, text in re.findall(r"photos/(cat-\d+)\.txt +(.+)", texts)}
    (photos / "captions.csv").write_text(table + "".join(f"{name}.jpg,{captions[name]}\n" for name in names[2:]))
    for number, (name, caption) in enumerate(captions.items()):
        Image.new("RGB", (80, 60), (20 * number, 100, 0)).save(photos / f"{name}.jpg")
        (photos / f"{name}.txt").write_text(caption)


def own_pairs(rooms: Path) -> None:
    """The same of its editing pairs."""
    rooms.mkdir()
    texts, table = (block for block in blocks(ROOT / "docs" / "own-images.md", "text") if "sofa-01" in block)
    assert set(re.findall(r"rooms/(\S+)", texts)) == {"sofa-01.source.jpg", "sofa-01.jpg", "sofa-01.txt"}
    for number in range(1, 13):
        for name, red in (("source.jpg", 0), ("jpg", 200)):
            Image.new("RGB", (80, 60), (red, 20 * number, 0)).save(rooms / f"sofa-{number:02}.{name}")
        (rooms / f"sofa-{number:02}.txt").write_text("make the sofa red")
    (row,) = re.findall(r"^sofa-01.*\n", table, flags=re.M)
    (rooms / "edits.csv").write_text(table + "".join(row.replace("-01", f"-{number:02}") for number in range(2, 13)))


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.timeout(1800)  # with the trainings of its fixture
def test_commands(folder: Path) -> None:
    for command in commands():
        check(command, folder)


def check(command: str, folder: Path) -> None:
    """Run `command`, reduced, or check the program that it would run."""
    words = shlex.split(command)
    program = words[0].removeprefix(".venv/bin/")
    if program == "bifrost":
        printed = bifrost(folder, *words[1:])
        if "--dry-run" in words and words[1] == "train":
            assert "trainable parameters" in printed
    elif program == "make":
        needed = {
            "demo": "bifrost train",
            "test": "pytest",
            "test-all": "pytest",
            "test-phantom": "pytest tests/phantom --real-size",
            "faults": "tests/faults/campaign.py --kills",
            "test-gpu": "-m pytest tests/kernels/test_gpu",
            "bench-gpu": "-m bifrost.kernels.bench",
            "device": "docs/benchmarks/device.py --budget 540",
            "device-wheels": "pip --disable-pip-version-check download",
            "setup": "pip install",
            "lint": "ruff check",
            "docs": "sphinx",
        }[words[1]]
        assert any(needed in line for line in recipe_of_make(*words[1:]))
    elif program == "srun":  # tests/slurm runs ranks under Slurm; here with --dry-run
        first = next(index for index, word in enumerate(words) if word in ("bifrost", "torchrun"))
        assert all(re.match(r"--(ntasks|ntasks-per-node|gpus|gpus-per-node|signal)=", word) for word in words[1:first])
        if words[first] == "torchrun":
            return check(shlex.join(words[first:]), folder)
        bifrost(folder, *words[first + 1 :], "--dry-run")
    elif program == "torchrun":  # several nodes: parsed by torchrun itself, run with --dry-run
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.no_python and parsed.training_script == "bifrost"
        bifrost(folder, *parsed.training_script_args, "--dry-run")
    elif command == ". .venv/bin/activate":
        assert any("-m venv .venv" in line for line in recipe_of_make("setup"))
    elif program in ("python3", "pip"):  # installations, not run here: those of `make setup`, with fewer extras
        torch_build = ["TORCH=cpu"] if "--extra-index-url" in words else []
        (line,) = (line for line in recipe_of_make("setup", *torch_build) if f" {words[1]} " in line)
        assert [word.split("[")[0] for word in words[1:]] == [
            word.split("[")[0] for word in shlex.split(line)[1:] if word != "--disable-pip-version-check"
        ]
    elif program == "mlflow":  # a server: its file is the one that runs are sent to
        source = (ROOT / "trainer" / "monitors" / "mlflow_run.py").read_text()
        assert words[-1] == "sqlite:///runs/mlflow.db" and "sqlite:///{self.folder.parent / 'mlflow.db'}" in source
    elif program == "tensorboard":  # a server: what it would read of the run that was just sent to it
        command = [sys.executable, "-m", "tensorboard.main", *words[1:], "--inspect"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        assert "runs/tiny-mllm/tensorboard" in ended.stdout and "train/loss" in ended.stdout
    elif program == "wandb":
        ended = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=True)
        assert "tiny-mllm" in ended.stdout and "train/loss" in ended.stdout
    elif program == "tar":
        subprocess.run(words, cwd=folder, check=True)
    elif program == "python":
        fewer = ["--seeds=2", "--captions=2", "--steps=4"] if words[2:3] == ["score"] else []
        if words[1] == "docs/make_counts.py":
            if device.unavailable():
                return
            fewer = ["tiny-mllm"]  # instead of all recipes
        script = ROOT / words[1] if words[1].startswith("examples/") else words[1]
        subprocess.run([sys.executable, script, *words[2:], *fewer], cwd=folder, check=True)
        assert Path(folder, "docs", "demo-loss.svg").stat().st_size > 5000
    else:
        raise AssertionError(f"{command}: no check of {program}")


@pytest.mark.slow
def test_python_blocks_load_and_run_the_exported_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in order, in the folder of its commands."""
    page = ROOT / "docs" / "pipeline.md"
    (export,) = (line for line in commands() if "--format pipeline" in line)
    bifrost(folder, *shlex.split(export)[1:])
    monkeypatch.chdir(folder)
    (short,) = blocks(ROOT / "README.md", "python")
    assert short == blocks(page, "python")[0]
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert Image.open(folder / "apple.png").size == (64, 64)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # like test_commands
def test_python_page_runs(folder: Path) -> None:
    """In a process of its own, since it trains."""
    script = "\n".join(blocks(ROOT / "docs" / "python.md", "python"))
    ended = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (folder / "car.png").is_file() and (folder / "sheet.png").is_file()


def test_python_page_lists_the_names_of_the_package() -> None:
    named = re.findall(r"^\| `(\w+)", TEXT[ROOT / "docs" / "python.md"], flags=re.M)
    assert sorted(named) == sorted(vars(bifrost_package)["_PUBLIC"])
    assert all(callable(getattr(bifrost_package, name)) for name in named)


def test_the_cpu_build_of_torch_is_the_pinned_one_from_another_index() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), flags=re.M))
    assert f"{pins['torch']}+cpu, to PyPI's {pins['torch']}" in TEXT[ROOT / "README.md"]
    with_cuda, with_cpu = (recipe_of_make("setup", f"TORCH={build}") for build in ("cuda", "cpu"))
    index = " --extra-index-url https://download.pytorch.org/whl/cpu"
    assert not any("index" in line for line in with_cuda)
    assert [re.sub(" +", " ", line.replace(index, "")) for line in with_cpu] == [
        re.sub(" +", " ", line) for line in with_cuda
    ]


def test_supported_pythons_are_the_declared_ones() -> None:
    setup = (ROOT / "setup.py").read_text()
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    assert f"Python {', '.join(declared[:-1])} or {declared[-1]}" in TEXT[ROOT / "README.md"]
    assert f'python_requires=">={declared[0]}"' in setup


def test_the_recipe_shown_is_the_demo_recipe() -> None:
    (shown,) = blocks(ROOT / "README.md", "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "recipes" / "tiny-mllm.yaml").read_text())


def test_recipes_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"]
    assert TEXT[ROOT / "docs" / "recipes.md"] == page(), "run python docs/make_recipes.py"


def test_the_table_of_own_images_is_the_plans() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_own_images.py"))
    text = TEXT[ROOT / "docs" / "own-images.md"]
    assert text == made["page"](text), "run python docs/make_own_images.py"
    assert {*made["SIZES"], *made["SMALL"]} == set(shipped_recipes()), "every recipe has a row"


def test_the_tables_of_ablations_are_those_of_the_records() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_ablations.py"))["page"]
    text = TEXT[ROOT / "docs" / "ablations.md"]
    assert text == page(text), "run python docs/make_ablations.py"


def test_seeds_of_an_ablation_are_added_to_the_record() -> None:
    joined = runpy.run_path(str(ROOT / "docs" / "make_ablations.py"))["joined"]
    rows = {"all": [], "masked": []}
    suite = Suite.model_validate(
        {
            "recipe": "x",
            "seeds": [0],
            "score": [],
            "categories": ["two"],
            "questions": {"loss": {"asks": "?", "paper": "all", "rows": rows}},
        }
    )
    before = [Row("loss", "masked", [0, 2], [0.1, 0.5], {"two": 0.3})]
    added = [Row("loss", "masked", [1], [0.6], {"two": 0.6}), Row("loss", "all", [0], [0.7], {"two": 0.7})]
    every = joined(suite, before, added)
    assert [row.name for row in every] == ["all", "masked"]
    assert (every[1].seeds, every[1].values) == ([0, 1, 2], [0.1, 0.6, 0.5])
    assert every[1].categories == pytest.approx({"two": (0.1 + 0.6 + 0.5) / 3})
    assert joined(suite, every, before) == every and joined(suite, before, every) == every
    for other, message in ((0.2, "seed 2: 0.2000 in the folder, 0.5000 in the record"), (0.5, "has seed 2 again")):
        with pytest.raises(SystemExit, match=message):
            joined(suite, before, [Row("loss", "masked", [2, 3], [other, 0.1], {"two": 0.3})])


def test_plan_page_is_up_to_date_and_its_anchors_hold() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_plan.py"))
    assert TEXT[ROOT / "docs" / "plan.md"] == made["page"](TEXT[ROOT / "docs" / "plan.md"]), (
        "run python docs/make_plan.py"
    )
    assert all(one.theirs == one.ours for one in made["counts"]())
    assert {one.what: one.error for one in made["anchors"]() if abs(one.error) > 0.15} == {}


def test_counts_are_of_every_recipe_and_agree_with_the_plan_of_today() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_counts.py"))
    text, counts = TEXT[ROOT / "docs" / "plan.md"], made["recorded"]()
    assert text == made["page"](text), "run python docs/make_counts.py"
    assert set(counts) == set(made["RECIPES"])
    for name, of_recipe in counts.items():
        found = [row.cells() for rows in made["rows"](name, of_recipe).values() for row in rows if not row.agrees]
        assert (found, made["problems"](of_recipe)) == ([], []), name


def test_parameter_counts() -> None:
    for recipe, page in (("tiny-mllm", "README.md"), ("mllm-3b", "docs/stage1.md"), ("mllm-7b", "docs/stage1.md")):
        printed = bifrost(ROOT, "train", recipe, "--dry-run")
        counts = re.findall(r"(?:trainable|frozen) parameters +([\d,]+)", printed)
        assert len(counts) == 2 and all(count in TEXT[ROOT / page] for count in counts), (recipe, counts)


@pytest.mark.slow
def test_metrics_page_lists_every_key(folder: Path) -> None:
    text = TEXT[ROOT / "docs" / "training.md"]
    steps, events = text.split("## metrics.jsonl")[1].split("## ")[0].split("A line with `event`")
    always = steps.split("With [validation]")[0]  # the keys of a validation: training/test_validation.py
    keys = {key for row in re.findall(r"^\| (`.*?) \|", always, flags=re.M) for key in re.findall(r"`(\w+)`", row)}
    lines = runs.lines(folder / "runs" / "tiny-mllm")
    assert {key for line in lines if "event" not in line for key in line if not key.startswith("val")} == keys
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", events, flags=re.M))
    for line in lines:
        if "event" in line:
            assert set(re.findall(r"`(\w+)`", rows[line["event"]])) == line.keys() - {"event", "time"}
    # The event of an evaluation is in a separate file: docs/tracking.md.
    files = [file for file in (ROOT / "trainer").rglob("*.py") if file.name != "evaluations.py"]
    source = "".join(file.read_text() for file in files)
    assert set(re.findall(r'"event": "(\w+)"', source)) == rows.keys()


def test_resume_rules_are_those_of_the_code() -> None:
    from bifrost.slurm.exit_codes import STOPPED
    from bifrost.trainer.stages.controlnet import ControlNetStage
    from bifrost.trainer.stages.patch_latents import PatchLatentStage
    from bifrost.trainer.training.setting_changes import FIXED

    text = TEXT[ROOT / "docs" / "training.md"]
    refused = re.search(r"These may not.*?take another", text, flags=re.S)
    named = {"stage", *FIXED, *PatchLatentStage.identity, *ControlNetStage.identity}
    assert refused and set(re.findall(r"`([\w.]+)`", refused[0])) == named
    assert f"| {STOPPED} | stopped" in text


@functools.cache
def verbs() -> dict[str, click.Command]:
    """`data verify` -> its command, except for those that scripts call."""
    from bifrost.trainer.cli.main import app

    found: dict[str, click.Command] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        all_of_it = {f"{name} {verb}": each for verb, each in inner.items()} if inner else {name: command}
        found.update({verb: each for verb, each in all_of_it.items() if not each.hidden})
    return found


def test_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `bifrost ([a-z -]+)", TEXT[ROOT / "README.md"], flags=re.M)
    assert {row.strip() for row in rows} == verbs().keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_named_anywhere_exist(page: Path) -> None:
    for words in re.findall(r"(?<!from )\bbifrost ((?:[a-z]+ ?)+[^`\n|]*)", "\n".join(code(page))):
        verb = next((v for v in verbs() if re.match(rf"{v}(?![\w-])", words)), None)
        assert verb, f"{page.name}: bifrost {words}"
        known = {option for parameter in verbs()[verb].params for option in parameter.opts}
        words, *others = words.split(" -- ")
        if others and others[0].startswith("--"):  # those of `bifrost slurm submit-eval` are passed to another command
            of_eval = {option for parameter in verbs()["eval"].params for option in parameter.opts}
            assert verb == "slurm submit-eval" and set(re.findall(r"(?<!\S)--[\w-]+", others[0])) <= of_eval
        if verb == "kernels bench":  # passes its arguments to its own parser
            known = {option for action in parser(True)._actions for option in action.option_strings}
        assert set(re.findall(r"(?<!\S)--[\w-]+", words)) <= known, f"{page.name}: bifrost {words}"


def code(page: Path) -> list[str]:
    """Fenced blocks and code spans."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", TEXT[page], flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.M | re.S)
    return [*fenced, *re.findall(r"`([^`\n]+)`", rest)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
    for span in code(page):
        if re.fullmatch(r"(tests|docs|trainer|data|kernels|recipes|slurm|examples)/[\w./-]+\.(py|md|yaml|svg)", span):
            assert (ROOT / span).exists(), f"{page.name}: {span}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    index = TEXT[ROOT / "docs" / "README.md"]
    pages = [page.relative_to(ROOT / "docs") for page in PAGES if ROOT / "docs" in page.parents]
    assert all(f"({page})" in index for page in pages if page != Path("README.md"))


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").glob("*.svg"))], ids=lambda page: page.name)
def test_no_machine_is_named(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|var|opt|scratch)/", text)
    assert not re.search(r"\b(localhost|127\.0\.0\.1|\d{1,3}(\.\d{1,3}){3})\b", text)
