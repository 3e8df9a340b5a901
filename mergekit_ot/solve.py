"""All plans of a pair, from the two stores of matched rows: layers, stream, neurons, heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm import tqdm

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.confidence import matched_correlation
from mergekit_ot.costs import correlation, correlation_cost, require_finite
from mergekit_ot.heads import HeadRows, solve_heads
from mergekit_ot.layer_map import layer_similarity, matched_pairs, monotone_map, parse_map
from mergekit_ot.maps import one_hot, sparsify
from mergekit_ot.residual import fit_residual, fitted_depths, refine_residual
from mergekit_ot.rows import RowStore
from mergekit_ot.settings import HARD_LIMIT, PlanSettings
from mergekit_ot.solvers import auto_reg, solve_plan
from mergekit_ot.structure import Structure
from mergekit_ot.witness import Reader, Witness


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
    vectors = []
    witness = Witness(read_target, read_donor, a, b, residual.maps, device)
    if "mlp" in settings.modules:
        for i, j in tqdm(pairs, desc="neurons", disable=quiet):
            records[str(i)]["neurons"], pick = _solve_neurons(bundle, target, donor, witness, i, j, settings, n_fit)
            if residual.same_stream:
                vectors.append(witness.stream_vectors(i, j, pick))
    if vectors:
        residual = refine_residual(residual, *(torch.cat(side) for side in zip(*vectors)))
        witness = replace(witness, stream=residual.maps)
    if "attn" in settings.modules:
        for i, j in tqdm(pairs, desc="heads", disable=quiet):
            records[str(i)]["heads"] = _solve_heads(bundle, target, donor, witness, i, j, n_fit)
    bundle.tensors["residual.to_target"] = residual.maps.to_target.float().cpu().contiguous()
    bundle.tensors["residual.to_donor"] = residual.maps.to_donor.float().cpu().contiguous()
    bundle.info |= {
        "kind": "structured",
        "target": a.summary(),
        "donor": b.summary(),
        "settings": settings.to_dict(),
        "rows": {"fit": n_fit, "held_out": target.rows - n_fit},
        "layer_map": layers,
        "layer_similarity": [[round(v, 6) for v in row] for row in similarity.tolist()],
        "residual": {
            "map": residual.maps.kind,
            "scores": residual.scores,
            "depth_scores": residual.depth_scores,
            "same_stream": residual.same_stream,
        },
        "stream_scale": {str(i): scale for (i, _), scale in zip(pairs, residual.scales[1:-1])},
        "layers": records,
    }
    return bundle


def _solve_neurons(
    bundle: PlanBundle,
    target: RowStore,
    donor: RowStore,
    witness: Witness,
    i: int,
    j: int,
    settings: PlanSettings,
    n_fit: int,
) -> tuple[dict, torch.Tensor]:
    """One plan for the hidden neurons, shared by gate, up and down; both witnesses count alike."""
    device = witness.device
    x, y = target.read(f"h.{i}", device), donor.read(f"h.{j}", device)
    require_finite(x, f"target layer {i} neurons")
    require_finite(y, f"donor layer {j} neurons")
    cost = correlation_cost((correlation(x[:n_fit], y[:n_fit]) + witness.neurons(i, j)) / 2)
    solver = settings.solver
    if solver == "auto":
        solver = "hard" if cost.numel() <= HARD_LIMIT else "entropic"
    reg = settings.reg
    if reg == "auto":
        reg = auto_reg(correlation(x[:n_fit], x[:n_fit])) if solver != "hard" else 0.03
    plan = solve_plan(cost, solver=solver, reg=reg, name=f"neurons of layer {i}")
    pick = plan.coupling.argmax(dim=1)
    # A mixture of gates is not the gate of a mixture: every target neuron copies one donor neuron.
    bundle.put_sparse(f"layers.{i}.neurons.to_target", one_hot(pick, y.shape[1]))
    to_donor, lost = sparsify(plan.to_donor)
    bundle.put_sparse(f"layers.{i}.neurons.to_donor", to_donor)
    held = matched_correlation(x[n_fit:], y[n_fit:], pick)
    return plan.evidence.to_dict() | {"held_out_correlation": float(held.mean()), "mass_lost": lost}, pick


def _solve_heads(
    bundle: PlanBundle,
    target: RowStore,
    donor: RowStore,
    witness: Witness,
    i: int,
    j: int,
    n_fit: int,
) -> dict:
    sides = []
    for store, layer in ((target, i), (donor, j)):
        sides.append(HeadRows(*(store.read(f"{site}.{layer}", witness.device) for site in ("q", "k", "v", "o_in"))))
    plan = solve_heads(*sides, witness, (i, j), n_fit)
    bundle.put_heads(i, plan)
    return {"value_score": plan.score, "similarity": plan.similarity}
