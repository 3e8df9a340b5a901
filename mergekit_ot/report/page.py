"""The report: `report.json` with everything measured, and `report.md` with its pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mergekit_ot.folders import refuse_foreign, replace_folder, scratch_beside
from mergekit_ot.report.evaluate import Evaluation
from mergekit_ot.report.plots import draw_all
from mergekit_ot.report.summary import layer_lines


CAPTIONS = {
    "layer_map": "Similarity of every pair of layers; the line is the map that was used.",
    "scores": "How well the plans hold on rows they were not fitted on, and the confidence that gates alpha.",
    "entropy": "How spread the plans are: 0 copies one donor neuron each, the logarithm of their number says nothing.",
    "norms": "Sizes of the transported weights: about 1 is expected, 0 would be plain shrinking.",
    "losses": "The merge beside everything it must beat.",
}


def refuse_other_report(folder: Path) -> None:
    """Refuse a folder for the report that holds anything else."""
    refuse_foreign(folder, "report.json", "an earlier report")


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write the report folder; it appears whole or not at all and replaces an older report, nothing else."""
    refuse_other_report(folder)
    report = {
        "losses": evaluation.rows(),
        "tokens": evaluation.tokens,
        "plans": evaluation.plans,
        "tensors": evaluation.tensors,
        "recipe": evaluation.recipe,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(folder)
    try:
        (scratch / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        pictures = draw_all(report, scratch)
        (scratch / "report.md").write_text(render(report, [path.name for path in pictures]))
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def render(report: dict, pictures: list[str]) -> str:
    """The Markdown page."""
    plans = report["plans"]
    lines = ["# Transport merge report", "", f"Scored on {report['tokens']} held-out tokens.", ""]
    lines += ["| model | nats per token | perplexity |", "|---|---|---|"]
    lines += [f"| {row['model']} | {row['loss']:.4f} | {row['perplexity']:.2f} |" for row in report["losses"]]
    lines += ["", verdict({row["model"]: row["loss"] for row in report["losses"]}), ""]
    for name in pictures:
        lines += [f"![{name}]({name})", "", CAPTIONS[Path(name).stem], ""]
    if "residual" in plans:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in plans["residual"]["scores"].items())
        lines += ["## Plans", "", f"Stream map: **{plans['residual']['map']}** (held-out R²: {scores}).", ""]
    lines += [*layer_lines(plans), "", "## Recipe", "", "```json", json.dumps(report["recipe"], indent=1), "```", ""]
    return "\n".join(lines)


def verdict(losses: dict[str, float]) -> str:
    """One honest sentence: does the merge beat the target, and does the donor's knowledge explain it?"""
    if "random donor" not in losses:
        missing = "A random donor was not measured: the recipe names solved plans only; add calibration.dataset."
        return f"{_verdict(losses)} {missing}"
    return _verdict(losses)


def _verdict(losses: dict[str, float]) -> str:
    merged, target = losses["merged"], losses["target"]
    controls = {name: losses[name] for name in ("shrink only", "random donor") if name in losses}
    best = min(controls, key=lambda name: controls[name])
    if merged >= target:
        return f"The merge does not beat the target on this text ({merged - target:+.4f} nats)."
    if merged >= controls[best]:
        return (
            f"The merge beats the target by {target - merged:.4f} nats, but so does the control {best!r}: "
            "this is not knowledge of the donor."
        )
    return (
        f"The merge beats the target by {target - merged:.4f} nats and the best control ({best}) by "
        f"{controls[best] - merged:.4f} nats."
    )
