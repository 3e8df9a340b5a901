"""Scale or close alpha where a plan is no better than chance."""

from __future__ import annotations

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.structure import split_name


#: `close` uses alpha as given where the confidence reaches `min_confidence` and 0 elsewhere; `scale` multiplies too.
GATES = ("close", "scale", "off")
#: Between Qwen2.5-Coder-0.5B and SmolLM2-135M about 0.4 (attention) and 0.17 (MLP); 0 for the same donor untrained.
DEFAULT_MIN_CONFIDENCE = 0.1


def confidence_of(bundle: PlanBundle, name: str) -> float:
    """Confidence, in [0, 1], of the plans that a tensor is transported with; 1 for bundles that carry none."""
    recorded = bundle.info.get("confidence")
    if recorded is None:
        return 1.0
    place = split_name(name)
    if place is None:
        return recorded["stream"]
    layer = recorded["layers"].get(str(place[0]), {})
    return layer.get("attn" if place[1].startswith("self_attn") else "mlp", 0.0)


def effective_alpha(alpha: float, bundle: PlanBundle, name: str, gate: str, min_confidence: float) -> float:
    """Alpha after the gate.

    Args:
        alpha (`float`): as the recipe gives it for this tensor.
        name (`str`): checkpoint name of the tensor.
        gate (`str`): one of `GATES`.
        min_confidence (`float`): confidence below which the gate closes.
    """
    if gate == "off":
        return alpha
    confidence = confidence_of(bundle, name)
    if confidence < min_confidence:
        return 0.0
    return alpha * confidence if gate == "scale" else alpha
