"""What will happen to each part of this pair, said before any long work."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot.alpha import DEFAULT_ALPHA, alpha_ranges
from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.layer_map import matched_pairs, parse_map
from mergekit_ot.planning import Pair
from mergekit_ot.settings import PlanSettings
from mergekit_ot.solve import rows_needed
from mergekit_ot.structure import layer_tensor


@dataclass(frozen=True)
class Finding:
    """One line of the compatibility table.

    Args:
        part (`str`): what is compared.
        target, donor (`str`): what each side has.
        outcome (`str`): what the merge does with it.
    """

    part: str
    target: str
    donor: str
    outcome: str


def compare(pair: Pair, settings: PlanSettings, alpha: object = DEFAULT_ALPHA) -> list[Finding]:
    """Compare two models by config and tensor names only; takes milliseconds.

    Args:
        pair ([`Pair`]): both models.
        settings ([`PlanSettings`]): what the recipe asks for.
        alpha (`object`, *optional*): its alpha setting.

    Returns:
        `list[Finding]`, from the outside in.
    """
    a, b = pair.target, pair.donor
    has_bias = [
        CheckpointReader(folder).files.get(layer_tensor(0, "self_attn.q_proj.bias")) is not None
        for folder in (pair.target_folder, pair.donor_folder)
    ]
    rows = [
        Finding("family", a.model_type, b.model_type, "the output is an ordinary " + a.model_type),
        Finding("stream width", str(a.width), str(b.width), f"one map for all layers, {settings.residual_map}"),
        Finding("layers", str(a.n_layers), str(b.n_layers), _layers(a.n_layers, b.n_layers, settings)),
        Finding("neurons", str(a.mlp_width), str(b.mlp_width), _neurons(a.activation, b.activation, settings)),
        Finding(
            "heads / key-value groups",
            f"{a.n_heads} / {a.n_kv_heads}",
            f"{b.n_heads} / {b.n_kv_heads}",
            "groups, then heads inside them" if "attn" in settings.modules else "kept",
        ),
        Finding("head size", str(a.head_dim), str(b.head_dim), _head_size(pair)),
        Finding("q, k norm", str(a.family.qk_norm), str(b.family.qk_norm), _qk_norm(pair)),
        Finding("q, k, v biases", str(has_bias[0]), str(has_bias[1]), _biases(*has_bias)),
        Finding("norms around blocks", _sandwich(a), _sandwich(b), "folded on the fly; the target keeps its own"),
        Finding("vocabulary", str(a.vocab_size), str(b.vocab_size), _vocabulary(settings)),
        Finding("alpha, before the gate", "", "", _alpha(pair, settings, alpha)),
        Finding("matched rows", "", "", f"at least {rows_needed(a, b)} needed"),
    ]
    return rows


def table(findings: list[Finding]) -> str:
    """The findings as a Markdown table."""
    lines = ["| part | target | donor | what happens |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {f.part} | {f.target} | {f.donor} | {f.outcome} |" for f in findings])


def _layers(target: int, donor: int, settings: PlanSettings) -> str:
    if settings.layer_map != "monotone":
        taken = len(matched_pairs(parse_map(settings.layer_map, target, donor)))
        return f"as given, {taken} of {target}: {settings.layer_map}"
    if target == donor:
        return "one to one"
    if target < donor:
        return f"the {target} that fit best, in order; {donor - target} donor layers are left out"
    return f"{donor} target layers take a donor layer, in order; {target - donor} keep their weights"


def _neurons(target: str, donor: str, settings: PlanSettings) -> str:
    if "mlp" not in settings.modules:
        return "kept"
    if target != donor:
        return f"one plan per layer; the gates differ ({target}, {donor}), so this is approximate"
    return "one plan per layer, shared by gate, up and down"


def _head_size(pair: Pair) -> str:
    if pair.target.head_dim == pair.donor.head_dim:
        return "frequency pairs by nearest frequency"
    return "frequency pairs by nearest frequency; pairs without a partner are left out"


def _qk_norm(pair: Pair) -> str:
    if pair.target.family.qk_norm == pair.donor.family.qk_norm:
        return "gains folded" if pair.target.family.qk_norm else "none"
    return "on one side only: q and k keep the target's weights"


def _biases(target: bool, donor: bool) -> str:
    if donor and not target:
        return "the donor's are dropped: the target has no place for them"
    if target and not donor:
        return "the donor's count as zero"
    return "transported" if target else "none"


def _sandwich(structure) -> str:
    return "before and after" if structure.family.attention_post_norm else "before"


def _alpha(pair: Pair, settings: PlanSettings, alpha: object) -> str:
    names = CheckpointReader(pair.target_folder).names()
    parts = []
    for block, (low, high) in alpha_ranges(alpha, names, pair.target.n_layers).items():
        if block in settings.modules:
            parts.append(f"{block} {low:g}" if low == high else f"{block} {low:g} to {high:g}")
    return ", ".join(parts)


def _vocabulary(settings: PlanSettings) -> str:
    if settings.embeddings == "shared":
        return "rows of shared tokens are merged, all others kept; the target keeps its tokenizer"
    return "the target keeps its embeddings, head and tokenizer"
