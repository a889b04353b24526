"""`bifrost score` on images: its values by formulas in fp64, by torchmetrics and by transformers; one-line errors."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import run_folders
import tiny_extractors
import tiny_flux
from bifrost.data import write_shard
from bifrost.data.errors import DataError
from bifrost.recipes import load_recipe
from bifrost.trainer.cli import main
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.image_scores import SEED, SPLITS, inception_score, kernel_distance

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("a red apple", "moon", "a red moon")


def bifrost(*arguments: object) -> None:
    assert not main.app(["score", *map(str, arguments)], standalone_mode=False)


def figures(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["figures"]


def random_images(count: int, seed: int, side: int = 16, shift: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    low = draw.integers(0, 200, (count, 4, 4, 3)) + shift
    return [np.asarray(Image.fromarray(each.astype(np.uint8)).resize((side, side))) for each in low]


def save(folder: Path, images: list[np.ndarray], prompts: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:05d}-image{number}.png")
        if prompts:
            lines.append({"file": f"{number:05d}-image{number}.png", "prompt": prompts[number % len(prompts)]})
    if lines:
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (90, 40)).save(folder / "contact_sheet.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_extractors.save(tmp_path_factory.mktemp("extractors"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractors.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """40 generated images with prompts, and 30 reference images."""
    place = tmp_path_factory.mktemp("sets")
    return save(place / "made", random_images(40, 1), PROMPTS), save(place / "real", random_images(30, 2, shift=30))


def read(folder: Path) -> torch.Tensor:
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_inception(sets: tuple[Path, Path], weights: tuple[Path, Path]) -> None:
    made, real = sets
    bifrost(made, "--reference", real, "--inception", weights[0], "--batch", 7)
    found = figures(made)["inception"]

    class Features(torch.nn.Module):
        num_features = 6
        net = torch.jit.load(str(weights[0]))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images, return_features=True).double()

    metric, extract = FrechetInceptionDistance(feature=Features()), Features()
    metric.update(read(made), real=False)
    metric.update(read(real), real=True)
    assert found["fid"] == pytest.approx(float(metric.compute()), rel=1e-6)
    with torch.no_grad():
        x, y = (extract(read(folder)).numpy() for folder in (made, real))
        p = extract.net(read(made), no_output_bias=True).double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.trace(scipy.linalg.sqrtm(a @ b)).real
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert found["fid"] == pytest.approx(wanted, rel=1e-6) and wanted > 0.1

    torch.manual_seed(SEED)
    values = [np.exp(_kl(part)) for part in np.array_split(p[torch.randperm(40).numpy()], SPLITS)]
    assert found["is"] == pytest.approx(np.mean(values), rel=1e-6) and found["is"] > 1.01
    assert found["is_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-5)

    torch.manual_seed(SEED)  # 100 subsets of 30: all of the smaller set, some of the larger
    values = [_mmd(y[torch.randperm(30).numpy()], x[torch.randperm(40).numpy()[:30]]) for _ in range(100)]
    assert found["kid"] == pytest.approx(np.mean(values), rel=1e-6)
    assert found["kid_std"] == pytest.approx(np.std(values), rel=1e-5)
    settings = json.loads((made / "metrics.json").read_text())["settings"]["inception"]
    assert (settings["images"], settings["reference_images"], settings["size"]) == (40, 30, 16)
    assert settings["sha256"] == hashlib.sha256(weights[0].read_bytes()).hexdigest()


def _kl(p: np.ndarray) -> float:
    return (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, term by term as in the paper's equation."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    apart = ~np.eye(m, dtype=bool)
    return xx[apart].sum() / (m * (m - 1)) + yy[apart].sum() / (m * (m - 1)) - 2 * xy.mean()


def test_a_class_without_probability_and_sets_of_one_size() -> None:
    sure = torch.eye(2).repeat(10, 1)
    assert 1 < inception_score(sure)["is"] <= 2 + 1e-9
    x, y = (torch.randn(12, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = kernel_distance(x, y)
    assert found == {"kid": pytest.approx(_mmd(x.double().numpy(), y.double().numpy())), "kid_std": 0.0}


def test_shards_as_reference_and_images_of_other_sizes(
    sets: tuple[Path, Path], weights: tuple[Path, Path], tmp_path: Path
) -> None:
    """A reference in shards gives what the same images in a folder give; --size scales both sets."""
    wide = [np.pad(image, ((0, 0), (5, 5), (0, 0))) for image in random_images(12, 3, side=24)]
    samples = []
    for number, image in enumerate(wide):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        samples.append((f"{number:02d}", {"png": file.getvalue(), "txt": b"moon"}))
    write_shard(tmp_path / "real-0.tar", samples)
    folder = save(tmp_path / "real", wide)
    made = save(tmp_path / "made", random_images(12, 1))
    options = ("--inception", weights[0], "--size", 8)
    bifrost(made, "--reference", tmp_path / "real-0.tar", *options)
    from_shards = figures(made)
    bifrost(made, "--reference", folder, *options)
    assert figures(made) == from_shards
    with pytest.raises(RunError, match=r"real-0\.tar: 00 has a side of 24 pixels, the first .* of 16: give .*--size"):
        bifrost(made, "--reference", tmp_path / "real-0.tar", "--inception", weights[0])
    bifrost(save(tmp_path / "alone", random_images(12, 1)), "--inception", weights[0])
    assert figures(tmp_path / "alone")["inception"].keys() == {"is", "is_std"}


def test_lpips_pairs_images_by_name(weights: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = random_images(5, 1), random_images(5, 2)
    made, real = save(tmp_path / "made", one), tmp_path / "real"
    real.mkdir()
    for number in reversed(range(5)):  # generate puts a number before the name
        Image.fromarray(other[number]).save(real / f"image{number}.png")
    bifrost(made, "--reference", real, "--lpips", weights[1], "--batch", 2)
    net = torch.jit.load(str(weights[1]))
    layer, w = dict(net.named_parameters()), net.weights.double().numpy()
    kernel, bias = (layer[name].detach().double().numpy() for name in ("layer.weight", "layer.bias"))

    def unit(image: np.ndarray) -> np.ndarray:
        x = image.astype(float) / 127.5 - 1
        rows = [
            [np.einsum("ijc,ocij->o", x[r : r + 3, c : c + 3], kernel) for c in range(0, 14, 2)]
            for r in range(0, 14, 2)
        ]
        found = np.maximum(np.array(rows) + bias, 0)
        return found / np.sqrt(np.square(found).sum(-1, keepdims=True) + 1e-10)

    wanted = [(w * np.square(unit(a) - unit(b))).sum(-1).mean() for a, b in zip(one, other, strict=True)]
    assert figures(made)["lpips"]["lpips"] == pytest.approx(np.mean(wanted), rel=1e-5)
    (real / "image3.png").unlink()
    with pytest.raises(RunError, match="has no image named 00003-image3: LPIPS compares images of the same name"):
        bifrost(made, "--reference", real, "--lpips", weights[1])


def test_clip_score_and_what_the_file_keeps(sets: tuple[Path, Path], clip: Path, weights: tuple[Path, Path]) -> None:
    made = sets[0]
    bifrost(made, "--inception", weights[0])
    bifrost(made, "--clip", clip, "--batch", 16)
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    pixels = processor(list(read(made).permute(0, 2, 3, 1).numpy()), return_tensors="pt").pixel_values
    wanted = []
    for number in range(40):
        ids = tiny_flux.tokenizer(9)(PROMPTS[number % 3], return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels[number : number + 1])
        wanted.append(max(100 * float(out.logits_per_image / model.logit_scale.exp()), 0))
    assert figures(made)["clip"]["clip_score"] == pytest.approx(np.mean(wanted), abs=0.2)  # pixels within rounding
    assert np.std(wanted) > 2
    assert figures(made).keys() == {"inception", "clip"}


def test_scores_are_added_to_the_run_at_the_step_that_made_the_images(
    weights: tuple[Path, Path], tmp_path: Path
) -> None:
    run = run_folders.save(tmp_path / "run", load_recipe("tiny-mllm", ["ema=null"]), 1)
    (run / "metrics.jsonl").touch()
    made = save(tmp_path / "made", random_images(10, 1), ("moon",))
    bifrost(made, "--inception", weights[0], "--run", run)
    lines = [json.loads(line) | {"mllm": f"{run.resolve()} step 5"} for line in (made / "prompts.jsonl").open()]
    (made / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bifrost(made, "--inception", weights[0], "--run", run)
    events = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [7, 5]
    assert events[0]["inception/is"] == figures(made)["inception"]["is"]


def _truncated(folder: Path) -> None:
    file = folder / "00003-image3.png"
    file.write_bytes(file.read_bytes()[:60])


def _smaller(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "00003-image3.png")


def _missing(folder: Path) -> None:
    (folder / "00003-image3.png").unlink()


def _grids(folder: Path) -> None:
    text = (folder / "prompts.jsonl").read_text()
    (folder / "prompts.jsonl").write_text(text.replace('"prompt"', '"seeds": [0, 1], "prompt"'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_truncated, "made: 00003-image3: image does not decode"),
        (_smaller, "made: 00003-image3 has a side of 8 pixels, the first generated image one of 16: give"),
        (_missing, "made: 1 image of 12 missing, such as 00003-image3.png; run the same"),
        (_grids, r"made: 00000-image0.png has several images \(--layout dpg\); score a folder"),
        (lambda made: (made / "prompts.jsonl").write_text("{}"), "prompts.jsonl: is not a record of"),
    ],
)
def test_unusable_images(
    change: Callable[[Path], object], message: str, weights: tuple[Path, Path], tmp_path: Path
) -> None:
    made = save(tmp_path / "made", random_images(12, 1), PROMPTS)
    change(made)
    with pytest.raises(RunError, match=message):
        bifrost(made, "--inception", weights[0])
    assert not (made / "metrics.json").exists()


def test_unusable_input(sets: tuple[Path, Path], weights: tuple[Path, Path], tmp_path: Path) -> None:
    made, real = sets
    inception, vgg = weights
    (tmp_path / "weights.pt").write_bytes(b"not a model")
    few = save(tmp_path / "few", random_images(9, 1))
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (made,): "nothing to score: give --inception",
        (made, "--lpips", vgg): "--lpips compares with --reference",
        (made, "--clip", tmp_path, "--reference", real): "--reference is for --inception and --lpips",
        (tmp_path / "none", "--inception", inception): "none: no such folder",
        (tmp_path / "empty", "--inception", inception): "empty: no images",
        (few, "--inception", inception): "few: 9 images, at least 10 are needed",
        (made, "--reference", few, "--inception", inception): "few: 9 images, at least 10 are needed",
        (made, "--inception", tmp_path / "none.pt"): r"none\.pt: no such file",
        (made, "--inception", tmp_path / "weights.pt"): r"weights\.pt: is not a TorchScript file",
        (made, "--inception", vgg): r"vgg16\.pt: its forward has no argument no_output_bias",
        (made, "--reference", made, "--lpips", vgg, "--size", 2): r"vgg16\.pt: fails on images of 2 x 2 pixels",
        (made, "--clip", tmp_path): "not the folder of a CLIP",
        (made, "--inception", inception, "--run", tmp_path): "not a run folder",
    }.items():
        with pytest.raises(RunError, match=message):
            bifrost(*arguments)
    with pytest.raises(DataError, match="nowhere"):
        bifrost(made, "--reference", tmp_path / "nowhere.tar", "--inception", inception)
