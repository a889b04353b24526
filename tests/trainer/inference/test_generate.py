"""Prompts to images: equal in any batch, rank and restart; benchmark layouts; one-line errors."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ranked
import tiny_flux
from bifrost.recipes import Recipe, load_recipe, to_yaml
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.cli import generate, main
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference import contact_sheet as sheets
from bifrost.trainer.inference.contact_sheet import font_for, make_contact_sheet
from bifrost.trainer.inference.flux_sampler import Sampling
from bifrost.trainer.inference.generator import Generator, Settings, load_controlnet
from bifrost.trainer.models.latent_controlnet import LatentControlNet, write_config
from bifrost.trainer.stages import StageModel, open_stage

FAST = Sampling(steps=3)
QUICK = ("--flux-steps=2", "--steps=4")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(folder: Path, recipe: Recipe, slots: tuple[str, ...], seed: int) -> Path:
    """A run folder as left by training, with random weights in place of zero-initialised ones."""
    stage = open_stage(recipe)
    model = stage.build()
    stage.load(model)
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for slot in slots:  # the last slot's weights stay in the model
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
        tensors[slot] = {name: p.detach().flatten().clone() for name, p in model.trainable().items()}
    buffers = {name: torch.rand(b.shape, generator=draw).add(0.5).to(b.dtype) for name, b in model.statistics().items()}
    shapes = {name: tuple(p.shape) for name, p in model.trainable().items()}
    Store(folder / "checkpoints").save(7, Payload(0, 1, tensors, shapes, {}, buffers))
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def flux(place: Path) -> Path:
    made = tiny_flux.pipeline()
    with torch.no_grad():  # the text must affect the image
        made.transformer.proj_out.weight.mul_(3)
        made.transformer.context_embedder.weight.mul_(20)
    return tiny_flux.save(made, place / "flux")


@pytest.fixture(scope="module")
def mllm(place: Path) -> Path:
    return make_run(place / "mllm", load_recipe("tiny-mllm", ["branch.positions=learned"]), ("master", "ema"), 1)


@pytest.fixture(scope="module")
def controlnet(place: Path, flux: Path) -> Path:
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null"])
    return make_run(place / "controlnet", recipe, ("master",), 2)


@pytest.fixture(scope="module")
def generator(mllm: Path, controlnet: Path) -> Generator:
    return Generator.load(mllm, controlnet)


@pytest.fixture(scope="module")
def drawing(place: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 96), Image.Resampling.BICUBIC).save(place / "drawing.png")
    return place / "drawing.png"


def equal(one: Image.Image, other: Image.Image, levels: int = 1) -> bool:
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
    return difference.max() <= levels


def differ(one: Image.Image, other: Image.Image) -> bool:
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean() > 1


def weights_of(model: StageModel | LatentControlNet) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def bifrost(*arguments: object) -> None:
    """Run the command in this process."""
    code = main.app(["generate", *map(str, arguments)], standalone_mode=False)
    assert not code


def test_ema_weights_are_used_if_a_run_has_them(generator: Generator, mllm: Path, controlnet: Path) -> None:
    averaged, trained = (
        Store(mllm / "checkpoints").newest_verified(),
        Store(controlnet / "checkpoints").newest_verified(),
    )
    assert averaged and trained
    found = weights_of(generator.mllm)
    assert all(torch.equal(found[name], averaged.full("ema", name)) for name in averaged.shapes)
    found = weights_of(generator.controlnet)
    assert all(torch.equal(found[n.removeprefix("controlnet.")], trained.full("master", n)) for n in trained.shapes)
    buffers = dict(generator.controlnet.named_buffers())
    assert buffers and all(torch.equal(buffers[n.removeprefix("controlnet.")], b) for n, b in trained.buffers().items())
    assert not any(module.training for part in (generator.mllm, generator.controlnet) for module in part.modules())


def test_averaged_weights_have_averaged_statistics(mllm: Path, flux: Path, tmp_path: Path, caplog) -> None:
    """In generate and export; a checkpoint without averaged statistics falls back to the live ones, with a log line."""
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}"])
    run = make_run(tmp_path / "run", recipe, ("master", "ema"), 3)
    reader = Store(run / "checkpoints").newest_verified()
    assert reader
    live = reader.buffers()
    where = torch.device("cpu"), torch.float32

    def taken(path: Path) -> dict[str, torch.Tensor]:
        return {f"controlnet.{n}": b for n, b in load_controlnet(path, None, 192, 4, *where)[0].named_buffers()}

    assert all(torch.equal(buffer, live[name]) for name, buffer in taken(run).items())
    assert "no averaged BatchNorm statistics" in caplog.text
    caplog.clear()

    slots = {slot: {n: reader.full(slot, n).flatten() for n in reader.shapes} for slot in reader.slots}
    averaged = {name: (buffer * 2).to(buffer.dtype) for name, buffer in live.items()}
    held = {**live, **{f"ema/{name}": buffer for name, buffer in averaged.items()}}
    Store(run / "checkpoints").save(8, Payload(0, 1, slots, reader.shapes, {}, held))
    assert all(torch.equal(buffer, averaged[name]) for name, buffer in taken(run).items())
    for ema, wanted in ((True, averaged), (False, live)):
        export(run, tmp_path / str(ema), "public", ema=ema)
        exported = load_file(tmp_path / str(ema) / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(exported[n.removeprefix("controlnet.")], b) for n, b in wanted.items())
        assert not [name for name in exported if "ema" in name]
    assert not caplog.text


def test_same_prompt_and_seed_same_image_alone_and_in_a_batch(generator: Generator) -> None:
    prompts, seeds = ["a red apple", "moon", "a red apple", "a"], [5, 5, 6, 2**40]
    for settings in (Settings(steps=5, flux=FAST), Settings(steps=5, guidance=2.0, flux=Sampling(steps=3, cfg=2.0))):
        images = generator.generate(prompts, seeds, settings)
        assert [image.size for image in images] == [(64, 64)] * 4
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            assert equal(generator.generate([prompt], [seed], settings)[0], image)
        for image, again in zip(images, generator.generate(prompts, seeds, settings, batch=3), strict=True):
            assert equal(again, image)
        assert differ(images[0], images[1]) and differ(images[0], images[2])


def test_controls(generator: Generator) -> None:
    prompts, seeds = ["a red apple", "moon"], [5, 5]
    usual = generator.generate(prompts, seeds, Settings(flux=FAST))
    decoded = []
    handle = generator.mllm.branch.register_forward_pre_hook(lambda *_: decoded.append(1))
    plain = generator.generate(prompts, seeds, Settings(controlnet=False, flux=FAST))
    handle.remove()
    assert not decoded, "FLUX alone needs no latents"
    silent = Sampling(steps=3, conditioning_scale=0.0)
    for one, other, same in zip(plain, generator.generate(prompts, seeds, Settings(flux=silent)), usual, strict=True):
        assert equal(one, other) and differ(one, same)
    latents = generator.latents(prompts, seeds)
    empty = generator.generate(prompts, seeds, Settings(empty_prompt=True, flux=FAST))
    assert differ(empty[0], usual[0]) and differ(empty[0], empty[1])
    given = generator.generate(["", ""], seeds, Settings(flux=FAST), latents)
    assert all(equal(*pair) for pair in zip(empty, given, strict=True))


def test_guidance_leads_away_from_the_empty_prompt(generator: Generator) -> None:
    def latents(prompt: str, guidance: float) -> torch.Tensor:
        return generator.latents([prompt], [3], Settings(steps=1, guidance=guidance))

    conditional, unconditional = latents("a red apple", 1.0), latents("", 1.0)
    torch.testing.assert_close(
        latents("a red apple", 2.5), unconditional + 2.5 * (conditional - unconditional), atol=1e-4, rtol=0
    )
    assert (conditional - unconditional).abs().mean() > 0.01


def test_latents_of_an_image(generator: Generator) -> None:
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    latents = generator.encode(images)
    assert torch.equal(latents, generator.mllm.backbone.patch_latents(images))
    made = generator.generate(["moon", "moon"], [1, 1], Settings(flux=FAST), latents)
    assert differ(*made)


@pytest.mark.parametrize("layout", ["public", "hf"])
def test_exports_and_the_public_controlnet(
    layout, generator: Generator, mllm: Path, flux: Path, tmp_path: Path
) -> None:
    export(mllm, tmp_path / "mllm", layout, dtype=torch.float32, ema=True)
    write_config(tmp_path / "flux_controlnet", generator.controlnet.shape)
    generator.controlnet.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "diffusion_pytorch_model.safetensors", tmp_path / "flux_controlnet")
    other = Generator.load(tmp_path / "mllm", tmp_path / "flux_controlnet", str(flux))
    assert other.flux_size == 64
    settings = Settings(flux=FAST)
    ours, theirs = (each.generate(["a red apple"], [5], settings)[0] for each in (generator, other))
    assert equal(ours, theirs, 0)


def test_bf16(mllm: Path, controlnet: Path, generator: Generator) -> None:
    small = Generator.load(mllm, controlnet, dtype=torch.bfloat16)
    assert {p.dtype for p in small.mllm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in small.flux.parameters()} == {torch.bfloat16}
    tables = (small.mllm.branch.rotary_embedding, small.mllm.backbone.text.rotary_emb)
    assert all(table.inv_freq.dtype == torch.float32 for table in tables)
    assert all(b.dtype != torch.bfloat16 for b in small.controlnet.statistics().values())
    assert torch.get_default_dtype() == torch.float32
    a, b = (each.latents(["moon"], [1], Settings(steps=1)).float() for each in (generator, small))
    assert (a - b).norm() < 0.1 * a.norm()


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


def test_reconstruction(mllm: Path, controlnet: Path, generator: Generator, drawing: Path, tmp_path: Path) -> None:
    command = ("--mllm", mllm, "--controlnet", controlnet, *QUICK, "--latents-from", drawing)
    bifrost(*command, "--out", tmp_path / "a")
    square = Image.open(drawing).crop((0, 8, 80, 88)).resize((112, 112), Image.Resampling.BICUBIC)
    latents = generator.encode(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])
    wanted = generator.generate([""], [0], Settings(flux=Sampling(steps=2)), latents)[0]
    assert equal(Image.open(tmp_path / "a" / "00000-drawing.png"), wanted)
    bifrost(*command, "--out", tmp_path / "b", "moon", "a red apple")
    assert len(list((tmp_path / "b").glob("0*.png"))) == 2


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "a photo of an apple"},
    {"tag": "colors", "include": [{"class": "apple", "color": "red"}], "prompt": "a red apple"},
]


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
        assert len(list(out.rglob("samples/*.png"))) == (8 if rank == "0" else 4)
        assert (out / "contact_sheet.png").exists() == (rank == "0")
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001", "contact_sheet.png", "prompts.jsonl"]
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
    monkeypatch.setattr(generate, "run_ranks", lambda ranks, arguments: started.append((ranks, arguments)) or 0)
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
    refused("missing: no such folder", "moon", mllm=missing)
    refused("missing: no such folder", "moon", controlnet=missing)
    refused("is a controlnet run, expected a patch-latents run", "moon", mllm=controlnet)
    refused("is a patch-latents run, expected a controlnet run", "moon", controlnet=mllm)
    refused("neither a run folder nor an export", "moon", mllm=flux)
    exported = tmp_path / "exported"
    exported.mkdir()
    recipe = load_recipe(mllm / "recipe.yaml").model_dump(mode="json")
    for content, message in (
        (json.dumps({"recipe": recipe})[:-9], "config.json: is not JSON"),
        (json.dumps({"recipe": {**recipe, "stepz": 3}}), "config.json: unknown key stepz; did you mean steps?; fix"),
        ("[]", "neither a run folder nor an export"),
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
    other = make_run(place / "other", load_recipe("tiny-mllm", ["data.image_size=224"]), ("master",), 3)
    refused("8 x 8 latents and 8 x 8 FLUX tokens need 'none'", "moon", mllm=other)


def test_a_controlnet_for_other_latents(generator: Generator, mllm: Path, flux: Path, tmp_path: Path) -> None:
    network = LatentControlNet(replace(generator.controlnet.shape, latent_width=24))
    network.save_pretrained(tmp_path)
    write_config(tmp_path, network.shape)
    with pytest.raises(RunError, match="expects patch latents of width 24, this MLLM has"):
        Generator.load(mllm, tmp_path, str(flux))


def test_contact_sheet() -> None:
    colours = ["red", "green", "blue"]
    rows = {"made": [Image.new("RGB", (64, 64), c) for c in colours], "real": [Image.new("RGB", (32, 64))] * 3}
    made = make_contact_sheet(
        rows, ["a caption that is much longer than its image is wide and continues", "b", "c"], across=2
    )
    width, height = made.size
    pixels = np.asarray(made).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (pixels == colour).all(axis=1).sum() == 128 * 128  # at twice their size
    assert 2 * 128 < width < 2 * 128 + 100 and 4 * 128 < height < 4 * 128 + 200


def test_captions_are_drawn_and_not_boxes() -> None:
    """A missing character is drawn as the font's `.notdef` glyph, like U+FFFF."""
    for text in ("€", "é", "→", "ß", "я", "λ", "ﬁ", "½", "\u2013", "…"):
        font = font_for(text)
        assert bytes(font.getmask(text)) != bytes(font.getmask("\uffff")), text
    assert font_for("a\n\tb").path == font_for("a").path
    assert font_for("猫 and more").getmask("a").getbbox()  # no box for what the usual font has


def test_a_character_that_no_font_has_is_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sheets, "_boxes", [])
    sheets._font.cache_clear()
    for text in ("\U00016800", "\U00016801 again", "a \U00016800"):  # Bamum, of the plain fonts in none
        font_for(text)
    (line,) = [each.getMessage() for each in caplog.records]
    assert "no font on this machine has \U00016800 (U+16800); install" in line
    font_for("plain text")
    assert len(caplog.records) == 1


def test_fontconfig_finds_fonts_unknown_to_matplotlib(monkeypatch, caplog, tmp_path: Path) -> None:
    """A font installed after matplotlib cached its list."""
    new = Path(shutil.copy(sheets._dejavu(), tmp_path / "new.ttf"))
    program = tmp_path / "fc-match"
    program.write_text(f'#!/bin/sh\n[ "$2" = ":charset=16802 16803" ] && printf %s {new}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    covered = sheets._covered
    monkeypatch.setattr(
        sheets, "_covered", lambda file: frozenset((0x16802, 0x16803)) if file == str(new) else covered(file)
    )
    assert font_for("\U00016803\U00016802").path == str(new) and not caplog.records
    sheets._font.cache_clear()


def test_a_truncated_prompt_is_logged_with_its_tokens(generator: Generator, caplog) -> None:
    long = "an apple and a pear " * 120
    generator.warn_about_truncation(["a red apple", long, long], Settings())
    (line,) = [each.getMessage() for each in caplog.records]
    whole = len(generator.template.tokenizer(generator.template.head + long + generator.template.tail).input_ids)
    kept = len(generator.template.ids(long))
    assert f"the branch's text model reads {kept} of {whole} tokens ({whole - kept} dropped)" in line
    assert generator.tokenizers([long]).t5.shape[1] == generator.tokenizers.t5_length
    for name, tokenizer in (("T5", generator.tokenizers.t5), ("CLIP", generator.tokenizers.clip)):
        count = len(tokenizer(long).input_ids)
        limit = getattr(generator.tokenizers, f"{name.lower()}_length")
        assert f"{name} reads {limit} of {count} tokens ({count - limit} dropped)" in line
    assert line.startswith("prompt 'an apple and a pear") and len(line) < 350
    caplog.clear()
    generator.warn_about_truncation([long], replace(Settings(), empty_prompt=True), decoded=False)
    assert not caplog.records, "nobody reads it"


def test_the_command_warns_about_a_truncated_prompt(mllm: Path, controlnet: Path, tmp_path: Path, caplog) -> None:
    runs = (f"--mllm={mllm}", f"--controlnet={controlnet}")
    bifrost(*runs, f"--out={tmp_path / 'out'}", *QUICK, "apple " * 300, "red apple")
    assert len([each for each in caplog.records if "is cut at its end" in each.getMessage()]) == 1
