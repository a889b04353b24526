"""The generate command: equal on any rank and after a restart; benchmark layouts; one-line errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ranked
import run_folders
from bifrost.recipes import load_recipe
from bifrost.trainer.cli import main, on_ranks
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.models.latent_controlnet import write_config
from images import equal

FAST = Sampling(steps=3)
QUICK = ("--flux-steps=2", "--steps=4")


pytestmark = pytest.mark.usefixtures("one_thread")


def bifrost(*arguments: object) -> None:
    """Run the command in this process."""
    code = main.app(["generate", *map(str, arguments)], standalone_mode=False)
    assert not code


def test_the_command(mllm: Path, controlnet: Path, generator: Generator, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (
        "--mllm",
        mllm,
        "--controlnet",
        controlnet,
        "--seed",
        5,
        *QUICK,
        "--out",
        out,
        "a red apple",
        "moon / sun!",
    )
    bifrost(*command)
    assert sorted(path.name for path in out.iterdir()) == [
        "00000-a-red-apple.png",
        "00001-moon-sun.png",
        "contact_sheet.png",
        "prompts.jsonl",
    ]
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        ("00000-a-red-apple.png", "a red apple", 5),
        ("00001-moon-sun.png", "moon / sun!", 5),
    ]
    assert lines[0]["settings"]["flux"]["steps"] == 2 and lines[0]["mllm"] == f"{mllm.resolve()} step 7"
    wanted = generator.generate(["a red apple"], [5], Settings(steps=4, flux=Sampling(steps=2)))[0]
    assert equal(Image.open(out / "00000-a-red-apple.png"), wanted)

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    (out / "00001-moon-sun.png").unlink()
    bifrost(*command)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert before.keys() == after.keys()
    assert [name for name in after if after[name] == before[name]] == ["00000-a-red-apple.png"]
    for change in (("--steps=5",), ("another prompt",)):
        with pytest.raises(RunError, match="was started with other prompts, settings or weights"):
            bifrost(*command, *change)


def test_checkpoints_instead_of_runs(mllm: Path, controlnet: Path, tmp_path: Path) -> None:
    """The same image, and the same record: a checkpoint is named by its run and step."""
    bifrost("--mllm", mllm, "--controlnet", controlnet, *QUICK, "--out", tmp_path / "runs", "moon")
    checkpoints = (run / "checkpoints" / "step-00000007" for run in (mllm, controlnet))
    options = [word for pair in zip(("--mllm", "--controlnet"), checkpoints, strict=True) for word in pair]
    bifrost(*options, *QUICK, "--out", tmp_path / "checkpoints", "moon")
    one, other = ((tmp_path / name / "00000-moon.png").read_bytes() for name in ("runs", "checkpoints"))
    assert one == other
    one, other = ((tmp_path / name / "prompts.jsonl").read_text() for name in ("runs", "checkpoints"))
    assert one == other and f'"{controlnet.resolve()} step 7"' in one


def test_reconstruction(mllm: Path, controlnet: Path, generator: Generator, drawing: Path, tmp_path: Path) -> None:
    command = ("--mllm", mllm, "--controlnet", controlnet, *QUICK, "--latents-from", drawing)
    bifrost(*command, "--out", tmp_path / "a")
    square = Image.open(drawing).crop((0, 8, 80, 88)).resize((112, 112), Image.Resampling.BICUBIC)
    latents = generator.encode(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])
    wanted = generator.generate([""], [0], Settings(flux=Sampling(steps=2)), latents)[0]
    assert equal(Image.open(tmp_path / "a" / "00000-drawing.png"), wanted)
    bifrost(*command, "--out", tmp_path / "b", "moon", "a red apple")
    assert len(list((tmp_path / "b").glob("0*.png"))) == 2


APPLE, MOON = {"class": "apple", "count": 1}, {"class": "moon", "count": 1}
GENEVAL = [
    {"tag": "single_object", "include": [APPLE], "prompt": "a photo of an apple"},
    {"tag": "two_object", "include": [APPLE, MOON], "prompt": "a photo of an apple and a moon"},
    {
        "tag": "counting",
        "include": [{"class": "apple", "count": 3}],
        "exclude": [{"class": "apple", "count": 4}],
        "prompt": "a photo of three apples",
    },
    {"tag": "colors", "include": [{**APPLE, "color": "red"}], "prompt": "a photo of a red apple"},
    {
        "tag": "position",
        "include": [MOON, {**APPLE, "position": ["left of", 0]}],
        "prompt": "a photo of an apple left of a moon",
    },
    {
        "tag": "color_attr",
        "include": [{**APPLE, "color": "red"}, {**MOON, "color": "blue"}],
        "prompt": "a photo of a red apple and a blue moon",
    },
]
"""A line of each of GenEval's six tags."""


def read_as_the_scorer(folder: Path) -> dict[str, int]:
    """Number of images per tag that GenEval's evaluate_images.py finds."""
    found: dict[str, int] = {}
    for number in folder.iterdir():
        if number.is_dir() and number.name.isdigit():
            tag = json.loads((number / "metadata.jsonl").read_text())["tag"]
            images = [path for path in (number / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
            found[tag] = found.get(tag, 0) + len(images)
    return found


def test_geneval_on_two_ranks(mllm: Path, controlnet: Path, generator: Generator, tmp_path: Path, monkeypatch) -> None:
    """The layout of djghosh13/geneval's README."""
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)  # as a launcher does
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        options = ("--seed", 10, "--layout", "geneval", "--prompts", prompts, *QUICK)
        bifrost("--mllm", mllm, "--controlnet", controlnet, "--out", out, *options)
        assert len(list(out.rglob("samples/*.png"))) == (24 if rank == "0" else 12)
        assert (out / "contact_sheet.png").exists() == (rank == "0")
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{number:05d}" for number in range(6)),
        "contact_sheet.png",
        "prompts.jsonl",
    ]
    assert read_as_the_scorer(out) == dict.fromkeys([line["tag"] for line in GENEVAL], 4)
    for number, line in enumerate(GENEVAL):
        folder = out / f"{number:05d}"
        assert sorted(p.name for p in folder.iterdir()) == ["metadata.jsonl", "samples"]
        assert [json.loads(text) for text in (folder / "metadata.jsonl").read_text().splitlines()] == [line]
        assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
        made = generator.generate(
            [line["prompt"]] * 4, range(10 + 4 * number, 14 + 4 * number), Settings(4, flux=Sampling(2))
        )
        for i, image in enumerate(made):
            assert equal(Image.open(folder / "samples" / f"{i:04d}.png"), image)


def test_dpg_bench(mllm: Path, controlnet: Path, generator: Generator, tmp_path: Path) -> None:
    """The layout of TencentQQGYLab/ELLA's README: a grid per prompt, named like its file, and no other file."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "COCOval_1.txt").write_text("a red apple\n")
    (prompts / "diffusiondb7.txt").write_text("moon")
    options = ("--layout", "dpg", "--prompts", prompts, *QUICK, "--batch", 3)
    bifrost("--mllm", mllm, "--controlnet", controlnet, "--out", tmp_path / "out", *options)
    images = tmp_path / "out" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["COCOval_1.png", "diffusiondb7.png"]
    grid = Image.open(images / "diffusiondb7.png")
    assert grid.size == (128, 128)
    made = generator.generate(["moon"] * 4, [4, 5, 6, 7], Settings(4, flux=Sampling(2)))
    for i, image in enumerate(made):
        left, top = i % 2 * 64, i // 2 * 64
        assert equal(grid.crop((left, top, left + 64, top + 64)), image)


def test_ranks_get_the_whole_command(mllm: Path, controlnet: Path, tmp_path: Path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(on_ranks, "run_ranks", lambda ranks, arguments: started.append((ranks, arguments)) or 0)
    zeros = ("--guidance", 0, "--flux-guidance", 0.0, "--conditioning-scale", 0)
    command = ("--mllm", mllm, "--controlnet", controlnet, *QUICK, "--schedule", "linear", "--empty-prompt", *zeros)
    bifrost(*command, "--out", tmp_path / "a", "--ranks", 3, "--", "-moon", "a=b")
    ((ranks, arguments),) = started
    assert ranks == 3 and not (tmp_path / "a").exists()
    main.app(arguments, standalone_mode=False)
    bifrost(*command, "--out", tmp_path / "b", "--", "-moon", "a=b")
    one, other = ((tmp_path / name / "prompts.jsonl").read_text() for name in "ab")
    assert one == other and '"linear"' in one and '"empty_prompt": true' in one and '"-moon"' in one
    settings = json.loads(one.splitlines()[0])["settings"]
    assert settings["guidance"] == settings["flux"]["guidance"] == settings["flux"]["conditioning_scale"] == 0


@pytest.mark.multi
def test_ranks_at_the_same_time(mllm: Path, controlnet: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\nmoon\na\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), *QUICK, "--out", str(tmp_path / "out")]
    for rank in ranked.bifrost(2, "generate", "--mllm", str(mllm), "--controlnet", str(controlnet), *options):
        assert rank.code == 0, rank.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000-a-red-apple.png", "00001-moon.png", "00002-a.png", "contact_sheet.png", "prompts.jsonl"]


def test_wrong_inputs_are_one_line_and_leave_nothing(
    mllm: Path, controlnet: Path, flux: Path, drawing: Path, place: Path, tmp_path: Path, generator: Generator
) -> None:
    out = tmp_path / "out"
    usual = {"mllm": mllm, "controlnet": controlnet, "out": out}

    def refused(message: str, *arguments: object, **changes: object) -> None:
        options = [f"--{name}={value}" for name, value in {**usual, **changes}.items()]
        with pytest.raises(RunError) as error:
            bifrost(*options, *QUICK, *arguments)
        assert message in str(error.value) and "\n" not in str(error.value), error.value
        assert not out.exists()

    missing = tmp_path / "missing"
    refused("missing: no such run folder", "moon", mllm=missing)
    refused("missing: no such run folder", "moon", controlnet=missing)
    refused("is a controlnet run, expected a patch-latents run", "moon", mllm=controlnet)
    refused("is a patch-latents run, expected a controlnet run", "moon", controlnet=mllm)
    refused("not a run folder, it has no recipe.yaml, nor is it an export of one", "moon", mllm=flux)
    exported = tmp_path / "exported"
    exported.mkdir()
    recipe = load_recipe(mllm / "recipe.yaml").model_dump(mode="json")
    for content, message in (
        (json.dumps({"recipe": recipe})[:-9], "config.json: is not JSON"),
        (json.dumps({"recipe": {**recipe, "stepz": 3}}), "config.json: unknown key stepz; did you mean steps?; fix"),
        ("[]", "not a run folder, it has no recipe.yaml, nor is it an export of one"),
    ):
        (exported / "config.json").write_text(content)
        refused(message, "moon", mllm=exported)
    refused("no such prompt file", prompts=missing)
    refused("no prompts: give some")
    refused("prompt 'a\\udcff': caption is not UTF-8", "a\udcff")
    refused("17 decoding steps for 16 patches: set 1 to 16", "moon", "--steps=17")
    refused("missing: cannot be read", "--latents-from", missing)
    refused("image does not decode", "--latents-from", mllm / "recipe.yaml")
    refused("--latents-from goes through the ControlNet", "--latents-from", drawing, "--no-controlnet")
    refused("geneval needs --prompts", "moon", "--layout=geneval")
    refused("dpg needs only --prompts", "moon", "--layout=dpg")
    for number, (content, message) in enumerate(
        (
            (b"\n \n", "contains no prompts"),
            (b"\xff\xfe\x00", "is not UTF-8"),
            (b'{"prompt": "moon"}\n{"text": "moon"}\n', "line 2: has no string `prompt`"),
            (b"moon\n", "line 1: is not JSON"),
            (b'{"prompt": "moon", "id": "../moon"}\n', "id '../moon' cannot be a file name"),
        )
    ):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(content)
        refused(message, prompts=file)
    file.write_text('{"prompt": "moon", "id": 1}\n' * 2)
    refused("two prompts have the same id", "--layout=dpg", prompts=file)
    refused("no such folder, and not a hub id", "moon", "--flux", missing)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"taken: is not empty \(thesis.txt\)"):
        bifrost("--mllm", mllm, "--controlnet", controlnet, "--out", taken, "moon")

    shape = generator.controlnet.shape
    public = tmp_path / "flux_controlnet"
    write_config(public, shape)
    generator.controlnet.save_pretrained(public, safe_serialization=True)
    write_config(public, shape)
    refused("names no FLUX; give the one it was trained on", "moon", controlnet=public)
    other = run_folders.save(place / "other", load_recipe("tiny-mllm", ["data.image_size=224"]), 3)
    refused("8 x 8 latents and 8 x 8 FLUX tokens need 'none'", "moon", mllm=other)


def test_the_command_warns_about_a_truncated_prompt(mllm: Path, controlnet: Path, tmp_path: Path, caplog) -> None:
    runs = (f"--mllm={mllm}", f"--controlnet={controlnet}")
    bifrost(*runs, f"--out={tmp_path / 'out'}", *QUICK, "apple " * 300, "red apple")
    assert len([each for each in caplog.records if "is cut at its end" in each.getMessage()]) == 1
