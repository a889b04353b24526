"""Questions asked of the MLLM before and after stage 1."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bifrost.data.scenes.grammar import render
from bifrost.data.scenes.heldout import heldout_scenes
from bifrost.data.scenes.questions import Question, questions
from bifrost.trainer.evaluation import understanding
from bifrost.trainer.evaluation.scene_samples import SceneSample
from bifrost.trainer.evaluation.understanding import measure_understanding
from bifrost.trainer.inference.generator import Generator, base_folder
from bifrost.trainer.models.prompt import QuestionTemplate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def samples() -> list[SceneSample]:
    return [
        SceneSample(number, f"{number}", scene.caption, render(scene), render(scene), scene)
        for number, scene in enumerate(heldout_scenes(1, 0))
    ]


def test_equal_to_the_bit_until_one_weight_changes(mllm: Path, generator: Generator, samples) -> None:
    folder = base_folder(mllm)
    found = measure_understanding(generator, folder, samples, 0)
    assert found is not None and found.equal and found.before == found.after
    assert found.n["all"] == sum(n for kind, n in found.n.items() if kind != "all") == 32
    assert list(found.before) == ["colour", "count", "place", "relation", "all"]
    backbone = generator.mllm.backbone
    assert not any(weight.requires_grad for weight in backbone.parameters())
    for weight in (backbone.text.layers[-1].mlp.down_proj.weight, backbone.vision.blocks[0].norm1.weight):
        before = weight.clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        changed = measure_understanding(generator, folder, samples[:2], 0)
        assert changed is not None and not changed.equal
        with torch.no_grad():
            weight.copy_(before)
    again = measure_understanding(generator, folder, samples[:2], 0)
    assert again is not None and again.equal


def test_an_answer_is_right_if_it_is_what_the_model_generates(mllm: Path, generator: Generator, samples) -> None:
    model = understanding._load(base_folder(mllm), torch.float32)
    tokenizer = generator.template.tokenizer
    template = QuestionTemplate(tokenizer, 16)
    answers: dict[str, list[int]] = {}
    asked, wanted = [], []
    for number, sample in enumerate(samples[:4]):
        question = questions(sample.scene)[number % 2].text
        image = "<|vision_start|>" + 16 * "<|image_pad|>" + "<|vision_end|>"
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": image + question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        assert ids[0].tolist() == template.question(question)
        pixels = understanding.pixel_patches(torch.from_numpy(sample.seen).permute(2, 0, 1)[None], 14, 2, 2)
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=1 + number,
        )[0, ids.shape[1] :].tolist()
        for right, given in ((True, generated), (False, [*generated[:-1], generated[-1] ^ 1])):
            answers[f"{number} {right}"] = given
            asked.append(understanding._Asked(number, Question("count", question, f"{number} {right}")))
            wanted.append(right)
    images = torch.from_numpy(np.stack([sample.seen for sample in samples])).permute(0, 3, 1, 2)
    given = SimpleNamespace(question=template.question, answer=answers.__getitem__)
    with torch.no_grad():
        found = understanding._answers(model, given, asked, images, slice(None))
    assert [is_right for is_right, _ in found] == wanted


def test_a_model_that_cannot_answer_is_not_asked(
    mllm: Path, generator: Generator, samples, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "untied"
    shutil.copytree(base_folder(mllm), folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    assert measure_understanding(generator, folder, samples[:1], 0) is None
    assert "no questions are asked of the MLLM" in caplog.text and "has no lm_head.weight" in caplog.text
    weights = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight"))
    save_file({**weights, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    found = measure_understanding(generator, folder, samples[:1], 0)
    assert found is not None and found.equal, "the head is not among the backbone's weights"
    assert found == measure_understanding(generator, base_folder(mllm), samples[:1], 0)
    save_file({f"vision_language_model.{name}": each for name, each in weights.items()}, folder / "model.safetensors")
    assert measure_understanding(generator, folder, samples[:1], 0) is None
    reason = understanding._cannot_answer(base_folder(mllm), "int8")
    assert reason and "held in 8 bits by the run (backbone.weights=int8)" in reason


def test_the_accuracy_is_by_kind_and_of_all() -> None:
    found = understanding._accuracy(["count", "place", "count", "count"], [True, False, False, True])
    assert found == {"count": pytest.approx(2 / 3), "place": 0.0, "all": 0.5}


def test_questions_depend_on_seed_and_index(samples) -> None:
    sample = max(samples, key=lambda each: len(questions(each.scene)))
    drawn = understanding._drawn(sample, 0)
    assert drawn == understanding._drawn(sample, 0)
    assert {each.kind for each in drawn} == {each.kind for each in questions(sample.scene)}
    assert len({tuple(understanding._drawn(replace(sample, index=index), 0)) for index in range(8)}) > 1
