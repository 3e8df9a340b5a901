"""Attention, matched from the outside in: key/value groups, query heads inside them, then the axes inside a head.

Keys and queries commute with rotary embeddings only through one rotation per frequency pair, so they are matched pair
by pair; values and outputs may be mixed freely inside a head. A target head copies one donor head (a mixture of heads
is not a head), while every donor head's output is handed on to the target heads that stand for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_ot.costs import correlation, correlation_cost
from mergekit_ot.procrustes import MapPair, explained_both_ways, simplest, two_scale_procrustes
from mergekit_ot.solvers import solve_plan
from mergekit_ot.structure import Structure
from mergekit_ot.witness import Witness


@dataclass(frozen=True)
class HeadPlan:
    """How the heads of one donor layer become the heads of one target layer.

    Args:
        pick (`torch.Tensor` of shape `(n_heads_target,)`): donor head that each target head copies.
        group_pick (`torch.Tensor` of shape `(n_groups_target,)`): donor group that each target group copies.
        mix (`torch.Tensor` of shape `(n_heads_donor, n_heads_target)`): row-stochastic; who stands for a donor head.
        pairs (`torch.Tensor` of shape `(head_dim_target / 2,)`): donor frequency pair of each target pair.
        phase (`torch.Tensor` of shape `(n_groups_target, head_dim_target / 2)`): rotation of each pair, radians.
        value_to_target (`torch.Tensor` of shape `(n_groups_target, head_dim_target, head_dim_donor)`): value axes.
        value_to_donor (`torch.Tensor` of shape `(n_groups_target, n_groups_donor, head_dim_donor, head_dim_target)`):
            value axes of every coupled pair of groups, zero elsewhere.
        score (`float`): mean held-out R² of the chosen value maps.
        similarity (`float`): mean CKA of matched heads.
    """

    pick: torch.Tensor
    group_pick: torch.Tensor
    mix: torch.Tensor
    pairs: torch.Tensor
    phase: torch.Tensor
    value_to_target: torch.Tensor
    value_to_donor: torch.Tensor
    score: float
    similarity: float


@dataclass(frozen=True)
class HeadRows:
    """Rows of one layer's attention: `q`, `k`, `v` before rotation and `o_in`, each `(n_rows, heads * head_dim)`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o_in: torch.Tensor

    def head(self, site: str, index: int, head_dim: int) -> torch.Tensor:
        """Columns of one head, `(n_rows, head_dim)`."""
        return getattr(self, site)[:, index * head_dim : (index + 1) * head_dim]


def head_cka(target: torch.Tensor, donor: torch.Tensor, target_size: int, donor_size: int) -> torch.Tensor:
    """Linear CKA of every target head with every donor head.

    Args:
        target (`torch.Tensor` of shape `(n_rows, heads_target * target_size)`): one site of the target.
        donor (`torch.Tensor` of shape `(n_rows, heads_donor * donor_size)`): the same site of the donor.
        target_size, donor_size (`int`): columns per head.

    Returns:
        `torch.Tensor` of shape `(heads_target, heads_donor)` in [0, 1]; 0 for heads that do not vary.
    """
    sides = []
    for rows in (target, donor):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - rows.mean(dim=0, keepdim=True)
        sides.append(rows / rows.square().mean().sqrt().clamp_min(1e-12))
    x, y = sides
    cross = (x.T @ y).reshape(x.shape[1] // target_size, target_size, y.shape[1] // donor_size, donor_size)
    shared = cross.square().sum(dim=(1, 3))
    norms = []
    for rows, size in ((x, target_size), (y, donor_size)):
        heads = rows.reshape(rows.shape[0], -1, size).transpose(0, 1)  # (heads, n_rows, size)
        norms.append((heads.transpose(1, 2) @ heads).square().sum(dim=(1, 2)).sqrt())
    scale = torch.outer(*norms)
    return torch.where(scale > 0, shared / scale.clamp_min(1e-30), torch.zeros_like(scale))


def _similarity(target: HeadRows, donor: HeadRows, sites: tuple[str, ...], a: Structure, b: Structure) -> torch.Tensor:
    """Mean CKA over sites of every target head with every donor head, `(heads_target, heads_donor)`."""
    tables = [head_cka(getattr(target, s), getattr(donor, s), a.head_dim, b.head_dim) for s in sites]
    return torch.stack(tables).mean(dim=0).cpu()


def match_heads(
    target: HeadRows, donor: HeadRows, a: Structure, b: Structure
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Couple key/value groups, and query heads inside coupled groups.

    Returns:
        The head coupling `(n_heads_target, n_heads_donor)` of total mass one, the donor group that each target group
        copies `(n_groups_target,)`, and the mean similarity of matched heads.
    """
    queries = _similarity(target, donor, ("o_in", "q"), a, b)
    values = _similarity(target, donor, ("v", "k"), a, b)
    inner, between = {}, torch.zeros(a.n_kv_heads, b.n_kv_heads)
    for g in range(a.n_kv_heads):
        for d in range(b.n_kv_heads):
            block = queries[g * a.group : (g + 1) * a.group, d * b.group : (d + 1) * b.group]
            inner[g, d] = solve_plan(1.0 - block, name="query heads").coupling
            between[g, d] = (float(values[g, d]) + float((inner[g, d] * block).sum())) / 2
    groups = solve_plan(1.0 - between, name="key/value groups").coupling
    coupling = torch.zeros(a.n_heads, b.n_heads)
    for (g, d), block in inner.items():
        coupling[g * a.group : (g + 1) * a.group, d * b.group : (d + 1) * b.group] = (groups[g, d] * block).cpu()
    # Among equally heavy partners (a widened donor's copies, uneven counts) copy the most similar one.
    shares = groups.cpu() / groups.max()
    group_pick = torch.where(shares > 1e-6, shares.round(decimals=5) + 1e-3 * between, -1.0).argmax(dim=1)
    return coupling, group_pick, float((coupling * queries.cpu()).sum())


def _pick_heads(coupling: torch.Tensor, group_pick: torch.Tensor, a: Structure, b: Structure) -> torch.Tensor:
    picks = []
    for head in range(a.n_heads):
        start = int(group_pick[head // a.group]) * b.group
        picks.append(start + int(coupling[head, start : start + b.group].argmax()))
    return torch.tensor(picks)


def match_frequencies(target: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Donor frequency pair nearest to each target pair on the log scale, `(head_dim_target / 2,)`."""
    distance = (target.double().log()[:, None] - donor.double().log()[None, :]).abs()
    return distance.argmin(dim=1)


def fit_phase(target: torch.Tensor, donor: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Rotation of every frequency pair that carries donor keys to target keys, zero where none is needed.

    Args:
        target (`torch.Tensor` of shape `(n_rows, head_dim_target)`): keys before rotation.
        donor (`torch.Tensor` of shape `(n_rows, head_dim_donor)`): keys before rotation.
        pairs (`torch.Tensor` of shape `(head_dim_target / 2,)`): donor pair of each target pair.
    """
    half, donor_half = target.shape[1] // 2, donor.shape[1] // 2
    x = torch.complex(target[:, :half].double(), target[:, half:].double())
    y = torch.complex(donor[:, pairs].double(), donor[:, pairs + donor_half].double())
    moment = (x * y.conj()).sum(dim=0)
    size = (x.abs().square().sum(dim=0) * y.abs().square().sum(dim=0)).sqrt().clamp_min(1e-30)
    without, with_rotation = moment.real / size, moment.abs() / size
    needed = without < torch.maximum(torch.full_like(without, 0.5), with_rotation - 0.25)
    return torch.where(needed, moment.angle(), torch.zeros_like(without)).float()


def fit_values(
    target: torch.Tensor, donor: torch.Tensor, n_fit: int, weights: tuple[torch.Tensor, torch.Tensor]
) -> tuple[MapPair, float]:
    """Map between the value axes of two groups: identity, permutation or two-scale rotation, the simplest that holds.

    A candidate holds when it explains either the held-out values or the value weights.

    Args:
        target (`torch.Tensor` of shape `(n_rows, head_dim_target)`): values.
        donor (`torch.Tensor` of shape `(n_rows, head_dim_donor)`): values.
        n_fit (`int`): leading rows used for fitting.
        weights (`tuple[torch.Tensor, torch.Tensor]`): value weights of both groups, `(head_dim, width_target)`.

    Returns:
        The map pair and its R² on held-out values.
    """
    x, y = target.double(), donor.double()
    candidates = []
    if x.shape[1] == y.shape[1]:
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        candidates.append(MapPair("identity", eye, eye))
    rows = tuple(weight.double().T for weight in weights)  # (width_target, head_dim)
    similarity = (correlation(x[:n_fit], y[:n_fit]) + correlation(*rows)) / 2
    plan = solve_plan(correlation_cost(similarity), name="value axes")
    candidates.append(MapPair("ot", plan.to_target, plan.to_donor))
    moments = (x[:n_fit].T @ y[:n_fit], x[:n_fit].T @ x[:n_fit], y[:n_fit].T @ y[:n_fit])
    candidates.append(two_scale_procrustes(*moments))
    scores = [explained_both_ways(pair, x[n_fit:], y[n_fit:]) for pair in candidates]
    chosen = simplest([max(score, explained_both_ways(pair, *rows)) for pair, score in zip(candidates, scores)])
    return candidates[chosen], scores[chosen]


def _rows_of(weight: torch.Tensor, group: int, shape: Structure) -> torch.Tensor:
    return weight[group * shape.head_dim : (group + 1) * shape.head_dim]


def solve_heads(target: HeadRows, donor: HeadRows, witness: Witness, layers: tuple[int, int], n_fit: int) -> HeadPlan:
    """Match the attention of target layer `layers[0]` with that of donor layer `layers[1]`."""
    a, b = witness.target, witness.donor
    value_weights = witness.values(*layers)
    coupling, group_pick, similarity = match_heads(target, donor, a, b)
    pairs = match_frequencies(a.frequencies[layers[0]], b.frequencies[layers[1]])
    rotate = not (a.family.qk_norm or b.family.qk_norm)  # per-head gains do not commute with rotations
    to_target = torch.zeros(a.n_kv_heads, a.head_dim, b.head_dim)
    to_donor = torch.zeros(a.n_kv_heads, b.n_kv_heads, b.head_dim, a.head_dim)
    phase = torch.zeros(a.n_kv_heads, a.head_dim // 2)
    scores = []
    for g in range(a.n_kv_heads):
        for d in range(b.n_kv_heads):
            mass = coupling[g * a.group : (g + 1) * a.group, d * b.group : (d + 1) * b.group].sum()
            if mass <= 1e-9 and d != int(group_pick[g]):
                continue
            weights = _rows_of(value_weights[0], g, a), _rows_of(value_weights[1], d, b)
            maps, score = fit_values(target.head("v", g, a.head_dim), donor.head("v", d, b.head_dim), n_fit, weights)
            to_donor[g, d] = maps.to_donor.float().cpu()
            if d == int(group_pick[g]):
                to_target[g] = maps.to_target.float().cpu()
                scores.append(score)
                if rotate:
                    keys = target.head("k", g, a.head_dim), donor.head("k", d, b.head_dim)
                    phase[g] = fit_phase(*keys, pairs.to(keys[0].device)).cpu()
    mix = coupling.T / coupling.T.sum(dim=1, keepdim=True).clamp_min(1e-30)
    pick = _pick_heads(coupling, group_pick, a, b)
    score = sum(scores) / len(scores)
    return HeadPlan(pick, group_pick, mix, pairs, phase, to_target, to_donor, score, similarity)
