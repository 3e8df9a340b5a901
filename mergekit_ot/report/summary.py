"""What a plan bundle says of itself, as text."""

from __future__ import annotations

from mergekit_ot.bundle import PlanBundle


def describe_bundle(bundle: PlanBundle) -> str:
    """A page of plain text: pair, stream map and its rivals, one line per layer."""
    info = bundle.info
    lines = [
        f"target {info['target']['model_type']} width {info['target']['width']}, "
        f"donor {info['donor']['model_type']} width {info['donor']['width']}; {bundle.bytes() / 1e6:.1f} MB",
        f"key {info.get('key', 'none')[:16]}, kind {info['kind']}",
    ]
    if "residual" in info:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in info["residual"]["scores"].items())
        lines.append(f"stream map: {info['residual']['map']} (held-out R²: {scores})")
    lines += ["", *layer_lines(info)]
    return "\n".join(lines)


def describe_merge(record: dict) -> str:
    """One line about a merge's `transport.json`: how much of the donor went in, and what the gate kept out."""
    parameters, layers = record["recipe"]["parameters"], record["plans"].get("confidence", {}).get("layers", {})
    text = f"{len(record['tensors'])} tensors carry the donor's weights"
    if layers and parameters["gate"] != "off":
        values = [value for layer in layers.values() for value in layer.values()]
        closed = sum(value < parameters["min_confidence"] for value in values)
        text += f"; the gate closed {closed} of {len(values)} blocks (confidence below {parameters['min_confidence']})"
    return text


def layer_lines(info: dict) -> list[str]:
    """One Markdown row per target layer."""
    confidence = info.get("confidence", {}).get("layers", {})
    lines = [
        "| layer | donor | neuron correlation | matches per neuron | value R² | head CKA | confidence attn / mlp |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer, donor in enumerate(info["layer_map"]):
        record = info.get("layers", {}).get(str(layer), {})
        neurons, heads = record.get("neurons", {}), record.get("heads", {})
        trust = confidence.get(str(layer), {})
        cells = [
            str(layer),
            "kept" if donor is None else str(donor),
            _number(neurons.get("confidence", {}).get("held_out")),
            _number(neurons.get("effective_matches")),
            _number(heads.get("value_score")),
            _number(heads.get("similarity")),
            f"{_number(trust.get('attn'))} / {_number(trust.get('mlp'))}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
