"""All plans of a pair, from the two stores of matched rows: layers, stream, neurons, heads."""

from __future__ import annotations

import torch
from tqdm import tqdm

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.confidence import (
    NULL_CHANNELS,
    NULL_DRAWS,
    NULL_ROWS,
    compare_with_null,
    partner_correlation,
    predicted_correlation,
    spaced,
)
from mergekit_ot.costs import correlation, correlation_cost, require_finite
from mergekit_ot.heads import HeadRows, solve_heads
from mergekit_ot.layer_map import layer_similarity, matched_pairs, monotone_map, parse_map
from mergekit_ot.maps import one_hot, sparsify
from mergekit_ot.procrustes import two_scale_procrustes
from mergekit_ot.residual import fit_residual, fitted_depths, refine_residual
from mergekit_ot.rows import RowStore
from mergekit_ot.settings import HARD_LIMIT, PlanSettings
from mergekit_ot.solvers import auto_reg, solve_plan
from mergekit_ot.structure import Structure
from mergekit_ot.transporter import Transporter
from mergekit_ot.witness import Reader, Witness


#: Weights that read the stream, and the setting that names their block.
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BLOCK_OF = {"self_attn": "attn", "mlp": "mlp"}
#: Share of the rows used for fitting; the last rows, which are whole texts of their own, are held out.
FIT_SHARE = 0.8


def rows_needed(target: Structure, donor: Structure) -> int:
    """Rows without which the stream map of this pair is not determined."""
    return int(max(target.width, donor.width) / FIT_SHARE) + 32


def solve_pair(
    target: RowStore,
    donor: RowStore,
    a: Structure,
    b: Structure,
    settings: PlanSettings,
    read_target: Reader,
    read_donor: Reader,
    *,
    device: str = "cpu",
    quiet: bool = False,
) -> PlanBundle:
    """Solve every plan of the structured preset.

    Args:
        target, donor ([`RowStore`]): matched rows.
        a, b ([`Structure`]): target and donor.
        settings ([`PlanSettings`]): choices.
        read_target, read_donor (`Callable[[str], torch.Tensor | None]`): weights by name, the second witness.

    Returns:
        [`PlanBundle`] without key.
    """
    n_fit = int(target.rows * FIT_SHARE)
    similarity = layer_similarity(target, donor, a.n_layers, b.n_layers, device=device)
    if settings.layer_map == "monotone":
        layers = monotone_map(similarity)
    else:
        layers = parse_map(settings.layer_map, a.n_layers, b.n_layers)
    pairs = matched_pairs(layers)
    depths = fitted_depths(pairs, a.n_layers, b.n_layers)
    residual = fit_residual(target, donor, depths, kind=settings.residual_map, n_fit=n_fit, device=device)
    bundle = PlanBundle({}, {})
    records: dict[str, dict] = {str(i): {"donor_layer": j} for i, j in pairs}
    witness = Witness(read_target, read_donor, a, b, residual.maps, device)
    if "mlp" in settings.modules:
        for i, j in tqdm(pairs, desc="neurons", disable=quiet):
            records[str(i)]["neurons"] = _solve_neurons(bundle, target, donor, witness, i, j, settings, n_fit)
    if "attn" in settings.modules:
        for i, j in tqdm(pairs, desc="heads", disable=quiet):
            records[str(i)]["heads"] = _solve_heads(bundle, target, donor, witness, i, j, n_fit)
    bundle.info |= {"layer_map": layers, "settings": settings.to_dict()}
    transporter = Transporter(bundle, a, b, read_target, read_donor)
    modules = [module for module in READERS if BLOCK_OF[module.partition(".")[0]] in settings.modules]
    vectors = (transporter.reader_vectors(i, module) for i, _ in pairs for module in modules)
    residual = refine_residual(residual, (pair for pair in vectors if pair is not None))
    bundle.tensors["residual.to_target"] = residual.maps.to_target.float().cpu().contiguous()
    bundle.tensors["residual.to_donor"] = residual.maps.to_donor.float().cpu().contiguous()
    bundle.info |= {
        "kind": "structured",
        "target": a.summary(),
        "donor": b.summary(),
        "rows": {"fit": n_fit, "held_out": target.rows - n_fit},
        "layer_similarity": [[round(v, 6) for v in row] for row in similarity.tolist()],
        "residual": {
            "map": residual.maps.kind,
            "scores": residual.scores,
            "depth_scores": residual.depth_scores,
            "same_stream": residual.same_stream,
        },
        "stream_scale": {str(i): scale for (i, _), scale in zip(pairs, residual.scales[1:-1])},
        "embedding_scale": residual.scales[0],
        "layers": records,
        "confidence": _confidence(records, residual.depth_scores),
    }
    return bundle


def _value_correlation(
    target: torch.Tensor, donor: torch.Tensor, group_pick: torch.Tensor, witness: Witness, n_fit: int
) -> tuple[float, float]:
    """Correlation of target values with donor values after the best rotation of each group, fitted and held out."""
    a, b = witness.target, witness.donor
    predicted = []
    for g, d in enumerate(group_pick.tolist()):
        x = target[:, g * a.head_dim : (g + 1) * a.head_dim].double()
        y = donor[:, d * b.head_dim : (d + 1) * b.head_dim].double()
        x, y = x - x[:n_fit].mean(dim=0), y - y[:n_fit].mean(dim=0)
        maps = two_scale_procrustes(x[:n_fit].T @ y[:n_fit], x[:n_fit].T @ x[:n_fit], y[:n_fit].T @ y[:n_fit])
        predicted.append(y @ maps.to_target.T)
    return predicted_correlation(target.double(), torch.cat(predicted, dim=1), n_fit)


def _confidence(records: dict[str, dict], depth_scores: list[float]) -> dict:
    """Confidence of every tensor group; 0 where the stream map explains nothing at that depth."""
    layers = {}
    for (layer, record), stream in zip(records.items(), depth_scores[1:-1]):
        parts = (("attn", "heads"), ("mlp", "neurons"))
        layers[layer] = {k: record[part]["confidence"]["value"] * (stream > 0) for k, part in parts if part in record}
    return {"stream": max(depth_scores[0], 0.0), "layers": layers}


def _solve_neurons(
    bundle: PlanBundle,
    target: RowStore,
    donor: RowStore,
    witness: Witness,
    i: int,
    j: int,
    settings: PlanSettings,
    n_fit: int,
) -> dict:
    """One plan for the hidden neurons, shared by gate, up and down; both witnesses count alike."""
    device = witness.device
    x, y = target.read(f"h.{i}", device), donor.read(f"h.{j}", device)
    require_finite(x, f"target layer {i} neurons")
    require_finite(y, f"donor layer {j} neurons")
    cost = correlation_cost((correlation(x[:n_fit], y[:n_fit]) + witness.neurons(i, j)) / 2)
    solver = settings.solver
    if solver == "auto":
        solver = "hard" if cost.numel() <= HARD_LIMIT else "entropic"
    reg = 0.03 if isinstance(settings.reg, str) else settings.reg
    if settings.reg == "auto" and solver != "hard":
        reg = auto_reg(correlation(x[:n_fit], x[:n_fit]))
    plan = solve_plan(cost, solver=solver, reg=reg, name=f"neurons of layer {i}")
    pick = plan.coupling.argmax(dim=1)
    # A mixture of gates is not the gate of a mixture: every target neuron copies one donor neuron.
    bundle.put_sparse(f"layers.{i}.neurons.to_target", one_hot(pick, y.shape[1]))
    to_donor, lost = sparsify(plan.to_donor)
    bundle.put_sparse(f"layers.{i}.neurons.to_donor", to_donor)
    rows = spaced(len(x), NULL_ROWS)
    x, y = x[rows, spaced(x.shape[1], NULL_CHANNELS)], y[rows]
    stream, n_fit = donor.read(f"stream.{2 * j + 1}", device)[rows], int(len(x) * FIT_SHARE)
    null = [partner_correlation(x, witness.null_neurons(j, stream, k), n_fit) for k in range(NULL_DRAWS)]
    trust = compare_with_null(partner_correlation(x, y, n_fit), null)
    return plan.evidence.to_dict() | {"confidence": trust.to_dict(), "mass_lost": lost}


def _solve_heads(
    bundle: PlanBundle,
    target: RowStore,
    donor: RowStore,
    witness: Witness,
    i: int,
    j: int,
    n_fit: int,
) -> dict:
    x, y = (
        HeadRows(*(store.read(f"{site}.{layer}", witness.device) for site in ("q", "k", "v", "o_in")))
        for store, layer in ((target, i), (donor, j))
    )
    plan = solve_heads(x, y, witness, (i, j), n_fit)
    bundle.put_heads(i, plan)
    stream = donor.read(f"stream.{2 * j}", witness.device)
    null = [witness.null_values(j, stream, k) for k in range(NULL_DRAWS)]
    found = [_value_correlation(x.v, rows, plan.group_pick, witness, n_fit) for rows in (y.v, *null)]
    trust = compare_with_null(found[0], found[1:])
    return {"value_score": plan.score, "similarity": plan.similarity, "confidence": trust.to_dict()}
