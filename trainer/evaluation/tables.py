"""The metrics of an evaluation, of retrieval or of scenes, as a text table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .evaluate import EDITED, Evaluation
from .reconstruction import ReconstructionEvaluation
from .scenes import SceneEvaluation
from .understanding import Understanding

LABELS = {
    "full": "both stages",
    "ground_truth": "true latents",
    "latents_alone": "true latents alone",
    "no_controlnet": "no ControlNet",
    "empty_prompt": "empty prompt",
    "other_latents": "another image's latents",
    "random_latents": "random latents",
    "other_source": "another pair's source image",
    "source": "the source image itself",
}
SCENE_ROWS = {
    "all objects right, in their places": {
        "both stages": ("both", "all"),
        "latents alone (empty prompt)": ("latents_alone", "all"),
        "FLUX alone (no ControlNet)": ("flux_alone", "all"),
        "true latents alone (ceiling)": ("true_latents", "all"),
        "another pair's source image": ("other_source", "all"),
        "another scene's latents: theirs": ("swapped", "all"),
        "another scene's latents win": ("swapped", "latents_win"),
        "the caption wins against them": ("swapped", "caption_wins"),
        "both stages, captions shuffled": ("shuffled", "all"),
        "stage 1 by a linear probe": ("probe", "all"),
        "the same, another source image": ("probe_other_source", "all"),
        "the same, captions shuffled": ("probe_shuffled", "all"),
        "true latents by the probe": ("probe_true", "all"),
    },
    "the right objects, in any places": {
        "both stages": ("both", "set"),
        "FLUX alone (no ControlNet)": ("flux_alone", "set"),
    },
}
"""Heading -> label -> control and its score."""
EDIT_ROWS = {
    "share of the objects that are in their places": {
        "both stages": ("both", "objects"),
        "stage 1 by a linear probe": ("probe", "objects"),
        "the source image itself": ("source", "objects"),
    }
}
"""The same of editing pairs alone: `all` is never right of a source image."""
PARTS = {"heldout": "held-out scenes", "seen": "scenes of the training set"}


def table(found: Evaluation | ReconstructionEvaluation | SceneEvaluation) -> str:
    """The metrics as a text table."""
    if isinstance(found, SceneEvaluation):
        return _scenes(found.scenes, found.understanding, found.edits)
    if isinstance(found, ReconstructionEvaluation):
        return _reconstruction(found)
    return _retrieval(found)


def _reconstruction(found: ReconstructionEvaluation) -> str:
    lines: list[str] = []
    for name, figures in found.figures.items():
        lines += [
            _heading(name, len(found.samples[name]), "captions"),
            "",
            *_fidelity(figures["reconstruction"], ""),
            "",
        ]
    return "\n".join(line.rstrip() for line in lines)


def _heading(name: str, several: int, what: str) -> str:
    return f"{'training' if name == 'train' else 'held-out'} {what}: {several}"


def _fidelity(row: Mapping[str, float], retrieval: str) -> list[str]:
    """retrieval: the heading of its column, if it was measured."""
    lines = [_row("reconstruction", "PSNR", "SSIM", retrieval)]
    kinds = {"true latents": "", "true latents alone": "latents_alone_", "VAE alone": "vae_"}
    for label, kind in {**kinds, "no ControlNet": "no_controlnet_"}.items():
        hits = f"{row[kind + 'r1']:.3f}" if kind + "r1" in row else ""
        lines += [_row(f"  {label}", f"{row[kind + 'psnr']:.2f} dB", f"{row[kind + 'ssim']:.4f}", hits)]
    return lines


def _retrieval(found: Evaluation) -> str:
    lines: list[str] = []
    for name, figures in found.figures.items():
        several = len(found.samples[name])
        lines += [_heading(name, several, "editing pairs" if found.edits else "captions"), ""]
        lines += [_row("hidden patches", "MSE", "cosine", "position mean's MSE")]
        for rate, row in figures["latents"].items():
            values = (f"{row[key]:.4f}" for key in ("mse", "cosine", "mean_mse"))
            lines += [_row(f"  {float(rate):.0%}", *values)]
        if "editing" in figures:
            lines += ["", *_edits(figures)]
        lines += ["", *_fidelity(figures["reconstruction"], f"R@1 of {found.gallery:,}")]
        lines += ["", _row(f"prompt match of {several}", "R@1", "R@5", "Fréchet distance")]
        for kind, label in LABELS.items():
            if (row := figures["match"].get(kind)) is None:
                continue
            lines += [_row(f"  {label}", f"{row['r1']:.3f}", f"{row['r5']:.3f}", f"{figures['frechet'][kind]:.4f}")]
            if "other_r1" in row:
                lines += [_row("    the other image", f"{row['other_r1']:.3f}", f"{row['other_r5']:.3f}", "")]
        row = figures["match"]["chance"]
        lines += [_row("  chance", f"{row['r1']:.3f}", f"{row['r5']:.3f}", ""), ""]
    return "\n".join(line.rstrip() for line in lines)


def _edits(figures: Mapping[str, Any]) -> list[str]:
    """What only editing pairs have."""
    lines = [_row("MSE by hidden patches", "own source", "another's", "the source's latents")]
    for rate, row in figures["latents"].items():
        values = (f"{row[key]:.4f}" for key in ("mse", "other_source_mse", "source_mse"))
        lines += [_row(f"  {float(rate):.0%}", *values)]
    row = figures["editing"]
    lines += ["", _row("edits and their targets", "PSNR", "SSIM", "")]
    for prefix, kind in EDITED.items():
        values = f"{row[prefix + 'psnr']:.2f} dB", f"{row[prefix + 'ssim']:.4f}", ""
        lines += [_row(f"  {LABELS[kind]}", *values)]
    return lines


def _row(label: str, *values: str) -> str:
    return f"{label:<30}" + "".join(f"{value:>{width}}" for value, width in zip(values, (12, 12, 22), strict=True))


def _scenes(figures: Mapping[str, Any], understanding: Understanding | None, edits: bool) -> str:
    lines = ["editing pairs: scenes are the targets of edits", ""] if edits else []
    headings = {**SCENE_ROWS, **(EDIT_ROWS if edits else {})}
    for part, controls in figures.items():
        shown = controls["both" if "both" in controls else "probe"]
        counts = {category: row["n"] for category, row in shown.items()}
        width = max(len(label) for rows in SCENE_ROWS.values() for label in rows) + 4

        def line(label: str, values: Mapping[str, str], width: int = width) -> str:
            return f"{label:<{width}}" + "".join(f"{value:>{len(name) + 2}}" for name, value in values.items())

        lines += [line(PARTS[part], {name: name for name in counts})]
        lines += [line("  number", {name: str(n) for name, n in counts.items()})]
        for heading, every in headings.items():
            rows = {label: where for label, where in every.items() if where[0] in controls}
            lines += [heading] if rows else []
            for label, (control, score) in rows.items():
                lines += [line(f"  {label}", {name: f"{controls[control][name][score]:.2f}" for name in counts})]
        lines += [""]
    if understanding is not None:
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in understanding.after.items() if kind != "all")
        equal = "equal to the bit" if understanding.equal else "NOT equal to the bit"
        lines += [
            f"questions about {PARTS[next(iter(figures))]} that the MLLM answers: {understanding.before['all']:.4f} of"
            f" {understanding.n['all']} before stage 1, {understanding.after['all']:.4f} after; logits {equal}",
            f"  by kind, after: {kinds}",
            "",
        ]
    return "\n".join(lines)
