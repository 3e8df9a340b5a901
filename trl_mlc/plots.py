"""Two figures: what changed in each language, and what each layer knows. Drawn from reports, never from a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from trl_mlc.evaluation.report import EvaluationReport
from trl_mlc.scan import LayerScore


TITLES = {
    "accuracy": "preference accuracy",
    "agreement": "agreement with anchor",
    "margin": "margin (nats)",
    "retrieval_at_1": "retrieval of translations",
    "centred_cosine": "centred cosine",
    "cross_prompt_cosine": "cosine of different prompts",
    "perplexity": "perplexity",
}
BEFORE, AFTER = "#9aa5b1", "#0b6e4f"
PANELS_IN_A_ROW = 4


def plot_languages(
    before: EvaluationReport, after: EvaluationReport, path: str | Path, metrics: Sequence[str] | None = None
) -> None:
    """One panel per metric, one line per language: a dumbbell from before (grey) to after (green).

    Args:
        before ([`EvaluationReport`]), after ([`EvaluationReport`]): of the same languages.
        path (`str` or `Path`): the suffix decides the format.
        metrics (`Sequence[str]`, *optional*): those that both reports have, if not given.

    Raises:
        `ValueError`: if the reports share no language or metric.
    """
    languages = [name for name in before.languages if name in after.languages]
    shared = [m for m in TITLES if any(m in before.languages[n] and m in after.languages[n] for n in languages)]
    metrics = shared if metrics is None else [m for m in metrics if m in shared]
    if not metrics:
        raise ValueError(f"The reports share languages {languages} and metrics {shared}; nothing to draw.")
    columns = min(len(metrics), PANELS_IN_A_ROW)
    lines = -(-len(metrics) // columns)
    size = (2.6 * columns + 0.8, (0.26 * len(languages) + 0.7) * lines + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(metrics) :]:
        panel.remove()
    for i, (panel, metric) in enumerate(zip(panels, metrics, strict=False)):
        for row, name in enumerate(languages):
            pair = [report.languages[name].get(metric) for report in (before, after)]
            if None in pair:
                continue
            panel.plot(pair, [row, row], color="#d0d7de", linewidth=2, zorder=1)
            panel.scatter(pair[0], row, color=BEFORE, s=26, zorder=2, label="before" if row == 0 else None)
            panel.scatter(pair[1], row, color=AFTER, s=26, zorder=3, label="after" if row == 0 else None)
        panel.set_title(TITLES[metric], fontsize=9)
        panel.set_yticks(range(len(languages)), languages if i % columns == 0 else [""] * len(languages))
        panel.set_ylim(len(languages) - 0.5, -0.5)
        panel.grid(axis="x", color="#eceff2")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0, labelsize=8)
    handles = [
        figure.axes[0].scatter([], [], color=c, s=26, label=t) for c, t in ((BEFORE, "before"), (AFTER, "after"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def plot_layers(scores: Sequence[LayerScore], path: str | Path) -> None:
    """Per layer: retrieval against the cosine of different prompts, and below them the spectrum of the groups.

    Args:
        scores (`Sequence[LayerScore]`): of one pooling, in order of depth.
        path (`str` or `Path`): the suffix decides the format.
    """
    layers = [score.layer for score in scores]
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    top.plot(layers, [s.retrieval for s in scores], color=AFTER, marker="o", markersize=3.5, label="retrieval at 1")
    top.plot(
        layers,
        [s.cross_prompt_cosine for s in scores],
        color="#b5483a",
        linestyle="--",
        label="cosine of different prompts",
    )
    best = max(scores, key=lambda score: score.retrieval)
    top.axvline(best.layer, color="#d0d7de", zorder=0)
    top.annotate(f"layer {best.layer}", (best.layer, 0.02), fontsize=8, ha="right", rotation=90, va="bottom")
    top.set_ylim(0, 1.02)
    top.legend(frameon=False, fontsize=8)
    top.set_title(f"Where translations meet ({scores[0].pooling} token pooling)", fontsize=10)
    for j in range(1, len(scores[0].spectrum)):
        shade = 0.25 + 0.55 * (j - 1) / max(1, len(scores[0].spectrum) - 2)
        bottom.plot(layers, [s.spectrum[j] for s in scores], color=(shade, shade, shade + 0.15), linewidth=1)
    bottom.set_ylabel("sigma_j / sigma_1", fontsize=8)
    bottom.set_xlabel("hidden state", fontsize=8)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for panel in (top, bottom):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(path, dpi=160)
