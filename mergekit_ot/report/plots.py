"""Pictures of a merge, drawn from the report's JSON only. The one file that knows matplotlib."""

from __future__ import annotations

import math
from pathlib import Path


#: Colour-blind safe pair used for attention and MLP throughout.
COLOURS = {"attn": "#0072B2", "mlp": "#D55E00"}


def draw_all(report: dict, folder: Path) -> list[Path]:
    """Draw every picture the report has data for.

    Args:
        report (`dict`): content of `report.json`.
        folder (`Path`): where the PNG files go.

    Returns:
        `list[Path]` of the written files; empty when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    drawn = [draw(report, folder) for draw in (_layer_map, _scores, _entropy, _tensors, _losses)]
    return [path for path in drawn if path is not None]


def _save(figure, folder: Path, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = folder / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def _layer_map(report: dict, folder: Path) -> Path | None:
    """Similarity of all layer pairs with the chosen map on top."""
    import matplotlib.pyplot as plt

    similarity = report["plans"].get("layer_similarity")
    if not similarity:
        return None
    figure, axes = plt.subplots(figsize=(5, 4.5))
    image = axes.imshow(similarity, cmap="viridis", aspect="auto", origin="lower")
    figure.colorbar(image, label="CKA")
    chosen = [(j, i) for i, j in enumerate(report["plans"]["layer_map"]) if j is not None]
    axes.plot(*zip(*chosen), "o-", color="white", markersize=4, markeredgecolor="black")
    axes.set(xlabel="donor layer", ylabel="target layer", title="Layer map")
    return _save(figure, folder, "layer_map")


def _scores(report: dict, folder: Path) -> Path | None:
    """Held-out scores and confidence by layer."""
    import matplotlib.pyplot as plt

    layers = report["plans"].get("layers")
    if not layers:
        return None
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.5))
    depth_scores = report["plans"]["residual"]["depth_scores"]
    left.plot(depth_scores, "k.-")
    left.set(xlabel="fitted depth", title="Stream map, held-out R²")
    index = sorted(int(i) for i in layers)
    for kind, part in (("attn", "heads"), ("mlp", "neurons")):
        for key, style in (("fitted", ":"), ("held_out", "-")):
            values = [layers[str(i)].get(part, {}).get("confidence", {}).get(key) for i in index]
            if all(value is not None for value in values):
                label = f"{part}, {key.replace('_', ' ')}"
                middle.plot(index, values, style, marker=".", color=COLOURS[kind], label=label)
    middle.set(xlabel="target layer", title="Correlation of matched channels")
    middle.legend(fontsize=8)
    confidence = report["plans"].get("confidence", {}).get("layers", {})
    for kind in ("attn", "mlp"):
        values = [confidence.get(str(i), {}).get(kind) for i in index]
        if all(value is not None for value in values):
            right.plot(index, values, ".-", color=COLOURS[kind], label=kind)
    right.set(xlabel="target layer", ylim=(-0.02, 1.02), title="Confidence")
    right.legend(fontsize=8)
    return _save(figure, folder, "scores")


def _entropy(report: dict, folder: Path) -> Path | None:
    """Entropy of each layer's neuron plan: over how many donor neurons a target neuron is spread."""
    import matplotlib.pyplot as plt

    layers = report["plans"].get("layers") or {}
    matches = {int(i): layer.get("neurons", {}).get("effective_matches") for i, layer in layers.items()}
    points = [(i, math.log(max(value, 1.0))) for i, value in sorted(matches.items()) if value is not None]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(*zip(*points), ".-", color=COLOURS["mlp"])
    axes.set(xlabel="target layer", ylabel="nats", title="Entropy of a neuron's row of the plan")
    axes.set_ylim(bottom=-0.02)
    return _save(figure, folder, "entropy")


def _tensors(report: dict, folder: Path) -> Path | None:
    """Size of each transported tensor over the target's."""
    import matplotlib.pyplot as plt

    tensors = report.get("tensors")
    if not tensors:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    parts: dict[str, list[tuple[int, float]]] = {}
    for name, record in tensors.items():
        pieces = name.split(".")
        if len(pieces) == 6 and pieces[-1] == "weight":
            parts.setdefault(pieces[4], []).append((int(pieces[2]), record["norm_ratio"]))
    for part, points in sorted(parts.items()):
        axes.plot(*zip(*sorted(points)), ".-", label=part, linewidth=1)
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xlabel="target layer", title="Norm of the transported weight over the target's")
    axes.legend(fontsize=7, ncol=2)
    return _save(figure, folder, "norms")


def _losses(report: dict, folder: Path) -> Path | None:
    """Loss of the merge beside its controls."""
    import matplotlib.pyplot as plt

    rows = report.get("losses")
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(6, 0.5 + 0.45 * len(rows)))
    names = [row["model"] for row in rows][::-1]
    values = [row["loss"] for row in rows][::-1]
    axes.barh(names, values, color=["#D55E00" if name == "merged" else "#999999" for name in names])
    axes.set_xlim(min(values) * 0.95, max(values) * 1.02)
    axes.set(xlabel="held-out nats per token")
    return _save(figure, folder, "losses")
