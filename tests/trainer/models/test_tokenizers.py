"""A tokenizer that gives every caption the same tokens, or is another model's, is refused before training."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import tiny_flux
from bifrost.recipes import FOLDER
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import tokenizers
from bifrost.trainer.models.flux import FluxFolder
from bifrost.trainer.models.prompt import load_tokenizer
from bifrost.trainer.models.tokenizers import open_tokenizer

TINY = FOLDER / "foundations" / "tiny"
ROWS = json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "qwen", ignore=shutil.ignore_patterns("*.safetensors")))


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("path", "encoder"),
    [
        ("tiny", "tiny"),
        ("tiny-flux/tokenizer", "tiny-flux/text_encoder"),
        ("tiny-flux/tokenizer_2", "tiny-flux/text_encoder_2"),
    ],
)
def test_whole_tokenizers_are_taken(path: str, encoder: str) -> None:
    config = json.loads((FOLDER / "foundations" / encoder / "config.json").read_text())
    rows = config.get("text_config", config)["vocab_size"]
    assert len(open_tokenizer(FOLDER / "foundations" / path, rows)) == rows > 500


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("Qwen2Tokenizer", "tokenizer.json or vocab.json and merges.txt"),
        ("CLIPTokenizer", "tokenizer.json or vocab.json and merges.txt"),
        ("T5Tokenizer", "tokenizer.json or spiece.model"),
    ],
)
def test_no_vocabulary_names_the_missing_files(tmp_path: Path, kind: str, files: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    made = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert made("the sea").input_ids == made("red cat").input_ids, "the library accepts it"
    with pytest.raises(RunError, match=f"{tmp_path}: .* has no vocabulary: .*; fetch {files}"):
        open_tokenizer(tmp_path, len(made))


def test_a_vocabulary_without_its_merges(qwen: Path) -> None:
    """Captions then differ in tokens, but only single characters, which the model does not know as words."""
    file = qwen / "tokenizer.json"
    made = json.loads(file.read_text())
    assert made["model"]["merges"]
    made["model"]["merges"] = []
    file.write_text(json.dumps(made))
    assert Tokenizer.from_file(str(file)).decode(Tokenizer.from_file(str(file)).encode("a red apple").ids)
    with pytest.raises(RunError, match=r"into 11 tokens, its merges are missing; fetch tokenizer\.json again"):
        load_tokenizer(qwen)
    vocabulary = made["model"]["vocab"]
    file.unlink()
    (qwen / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (qwen / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(RunError, match=r"the tokenizer cannot be read; fetch"):
        load_tokenizer(qwen)


def test_another_models_tokenizer(qwen: Path) -> None:
    for rows in (ROWS - 1, ROWS * 2):
        with pytest.raises(RunError, match=f"has {ROWS} tokens but the model's embedding {rows} rows"):
            open_tokenizer(qwen, rows)
    open_tokenizer(qwen, ROWS + 20)  # embeddings are padded


BREAK: dict[str, Callable[[Path], None]] = {
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "is token 3 of the tokenizer and 9": lambda folder: change(folder / "config.json", vision_start_token_id=9),
    "is token 5 of the tokenizer and 9": lambda folder: change(folder / "config.json", image_token_id=9),
    "(has no vocabulary|the tokenizer cannot be read).*fetch": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("reason", BREAK)
def test_a_qwen_whose_files_do_not_fit(qwen: Path, reason: str) -> None:
    load_tokenizer(qwen)
    BREAK[reason](qwen)
    with pytest.raises(RunError, match=reason):
        load_tokenizer(qwen)


def test_a_missing_tokenizer_json_is_named_in_one_whole_line(qwen: Path) -> None:
    """transformers' own message has several lines, the first of which ends in "from one of:"."""
    (qwen / "tokenizer.json").unlink()
    with pytest.raises(RunError) as caught:
        load_tokenizer(qwen)
    line = str(caught.value)
    assert "\n" not in line and "fetch" in line and "tokenizer.json" in line, line
    assert not re.search(r": *\)", line) and len(line) < 500, line


def test_the_whole_reason_of_a_reader_is_quoted(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*_: object, **__: object) -> None:
        raise ValueError("Couldn't instantiate the backend tokenizer from one of: \n(1) a library file, \n(2) another.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unread)
    with pytest.raises(RunError, match=r"files again \(Couldn't .* from one of: \(1\) a library file, \(2\) another"):
        open_tokenizer(qwen, ROWS)
    (qwen / "tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"fetch tokenizer\.json, which is missing \(Couldn't .* \(2\) another"):
        open_tokenizer(qwen, ROWS)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_flux_is_refused_when_it_is_opened(tmp_path: Path, name: str) -> None:
    folder = tiny_flux.save(tiny_flux.pipeline(), tmp_path)
    FluxFolder.open(folder)
    (folder / name / "tokenizer.json").unlink()
    with pytest.raises(RunError, match=f"{name}: .*fetch"):
        FluxFolder.open(folder)
    FluxFolder.open(folder, for_counting=True)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 tokenizer of spiece.model alone, as some hub folders have it."""
    folder = tmp_path_factory.mktemp("spiece")
    lines = ["a red apple on a table", "the moon over the sea", "red apple", "a red apple"] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=23,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return folder


def test_spiece_without_its_package_is_named(spiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*_: object, **__: object) -> None:
        raise ValueError("Couldn't instantiate the backend tokenizer from one of: …")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unread)
    monkeypatch.setattr(tokenizers, "_installed", lambda package: package != "sentencepiece")
    with pytest.raises(RunError, match=r"spiece\.model needs the package sentencepiece \(pip install sentencepiece\)"):
        open_tokenizer(spiece, 23)
    monkeypatch.setattr(tokenizers, "_installed", lambda package: True)
    with pytest.raises(RunError, match="Couldn't instantiate"):
        open_tokenizer(spiece, 23)
