"""Generation from a source image and an instruction: the prefix that training reads, in the API and in the command."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import run_folders
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.models.source_tokens import SourceTokens
from images import equal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def edits(place: Path) -> Path:
    sources = ["data.shards=null", "data.sources=[{name: edits, shards: edits, task: editing}]"]
    return run_folders.save(place / "edits", load_recipe("tiny-mllm", ["branch.positions=mrope", *sources]), 1)


@pytest.fixture(scope="module")
def editor(edits: Path, controlnet: Path) -> Generator:
    return Generator.load(edits, controlnet)


def bifrost(*arguments: object) -> None:
    code = main.app(["generate", *map(str, arguments)], standalone_mode=False)
    assert not code


def test_guidance_is_between_the_instruction_and_none_with_the_same_source(editor: Generator, drawing: Path) -> None:
    """In one step all patches are predicted from the prefix alone, computed here without the decoder's functions."""
    source = editor.source_image(drawing.read_bytes())
    model, template, found = editor.mllm, editor.template, []
    for text in ("make it blue", ""):
        ids = torch.tensor(template.ids(text, 16))
        tokens = SourceTokens.of(
            model.backbone.patch_latents(source[None]), [len(ids)], [template.source_begin], (4, 4)
        )
        prefix = model.backbone.prefix(ids, PrefixLayout.of([len(ids)], 16), tokens)
        with torch.no_grad():
            hidden = model.branch(torch.zeros(1, 16, 192), torch.ones(1, 16, dtype=torch.bool), prefix)
            found.append(model.head(hidden.flatten(0, 1)))
    edited, plain = found
    for guidance in (1.0, 3.0):
        latents = editor.latents(["make it blue"], [0], Settings(steps=1, guidance=guidance), [source])
        torch.testing.assert_close(latents[0], plain + guidance * (edited - plain), atol=1e-5, rtol=0)


def test_prompts_with_and_without_a_source_in_one_batch(editor: Generator, drawing: Path) -> None:
    source = editor.source_image(drawing.read_bytes())
    prompts, shown = ["an owl", "make it blue", "make it blue"], [None, source, 255 - source]
    settings = Settings(steps=4, guidance=2.0)
    together = editor.latents(prompts, [1, 2, 2], settings, shown)
    for number, (prompt, each) in enumerate(zip(prompts, shown, strict=True)):
        alone = editor.latents([prompt], [1 + (number > 0)], settings, [each])
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)
    assert (together[1] - together[2]).abs().max() > 1e-2, "the source matters"


def test_the_command(edits: Path, controlnet: Path, editor: Generator, drawing: Path, tmp_path: Path) -> None:
    given = ("--mllm", edits, "--controlnet", controlnet, "--source", drawing, "--steps=4", "--flux-steps=2")
    bifrost(*given, "--out", tmp_path / "out", "make it blue")
    settings = Settings(steps=4, flux=Sampling(steps=2))
    source = editor.source_image(drawing.read_bytes())
    (wanted,) = editor.generate(["make it blue"], [0], settings, sources=[source])
    assert equal(Image.open(tmp_path / "out/00000-make-it-blue.png"), wanted)
    line = json.loads((tmp_path / "out/prompts.jsonl").read_text())
    assert line["source"] == str(drawing.resolve())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--latents-from",), "with --latents-from none are decoded"),
        (("--no-controlnet",), "with --no-controlnet none are decoded"),
        ((), "was not trained on editing pairs"),
    ],
)
def test_what_cannot_be_edited_is_one_line(
    mllm: Path, controlnet: Path, drawing: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    more = [*options, *([drawing] if options == ("--latents-from",) else [])]
    with pytest.raises(RunError, match=reason) as refused:
        bifrost("--mllm", mllm, "--controlnet", controlnet, "--out", tmp_path / "out", "--source", drawing, *more, "x")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
