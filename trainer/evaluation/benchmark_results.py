"""Results of benchmarks' own scorers, read back: GenEval and DPG-Bench."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import RunError

DPG_SCORE = "DPG-Bench score"
L1, L2 = "L1 category scores", "L2 category scores"


def read_geneval(path: Path) -> dict[str, Any]:
    """GenEval's results.jsonl (https://github.com/djghosh13/geneval), a line per image, as its summary_scores.py.

    Returns `score`, the mean of the tags' fractions of correct images; `tags` with these; `correct_images`;
    `correct_prompts`, the fraction of prompts with at least one correct image; `images`, `prompts`. RunError unless it
    is such a file.
    """
    images: list[bool] = []
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            found = json.loads(line)
            correct, tag, prompt = found["correct"], found["tag"], found["metadata"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}, line {number}: not a result of GenEval ({error!r})") from error
        if not isinstance(correct, bool) or not isinstance(tag, str):
            raise RunError(f"{path}, line {number}: not a result of GenEval (correct and tag have other types)")
        images.append(correct)
        by_tag.setdefault(tag, []).append(correct)
        by_prompt.setdefault(str(prompt), []).append(correct)
    if not images:
        raise RunError(f"{path}: has no results")
    tags = {tag: _mean(found) for tag, found in sorted(by_tag.items())}
    return {
        "score": _mean(list(tags.values())),
        "tags": tags,
        "correct_images": _mean(images),
        "correct_prompts": _mean([any(found) for found in by_prompt.values()]),
        "images": len(images),
        "prompts": len(by_prompt),
    }


def read_dpg(path: Path) -> dict[str, Any]:
    """The file of DPG-Bench's compute_dpg_bench.py (https://github.com/TencentQQGYLab/ELLA): a line per grid of images,
    then its summary.

    Returns `score`, in percent, `l1` and `l2` with the scores of categories, `prompts`. RunError unless the file is
    complete and its summary is the mean of its lines.
    """
    scores, summary, part = [], {L1: {}, L2: {}}, ""
    total = None
    for line in _lines(path):
        name, _, value = line.strip().rpartition(": ")
        if line.endswith("scores:"):
            part = line.rstrip(":")
        elif line.startswith("\t") and part in summary and (score := _number(value)) is not None:
            summary[part][name] = score
        elif name == DPG_SCORE:
            total = _number(value)
        elif re.search(r"\.\w+, [\d.e-]+(, [\d.e-]+)+$", line):  # path, score of each sample, their mean
            scores.append(float(line.rpartition(", ")[2]))
    if total is None or not scores:
        raise RunError(f"{path}: has no line `{DPG_SCORE}: …` after its scores; let compute_dpg_bench.py finish")
    if not math.isclose(total, 100 * _mean(scores), rel_tol=1e-6, abs_tol=1e-6):
        raise RunError(
            f"{path}: {DPG_SCORE} {total}, but its {len(scores)} lines have a mean of {100 * _mean(scores):.6g}: it is"
            " damaged, or of two runs of the scorer; score the images again"
        )
    return {"score": total, "l1": summary[L1], "l2": summary[L2], "prompts": len(scores)}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); name the file that the scorer wrote") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not text; name the file that the scorer wrote") from error


def _mean(values: list[bool] | list[float]) -> float:
    return sum(values) / len(values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
