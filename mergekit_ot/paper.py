"""The paper's own recipe, for comparison: per-module entropic plans on pooled rows, all donor layers, attention only.

`preset: paper` follows the paper (Eq. 7-14 and 16) with the one correction that makes it mean something: couplings are
turned into barycentric maps. `preset: paper-released` follows the released arithmetic as it is described in
docs/merge.md: bare couplings, and only as many donor layers as the target has. Both write the transported rows into the
bundle, because a sum over donor layers has no lazy form worth having.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.costs import correlation, correlation_cost
from mergekit_ot.plan import TransportPlan
from mergekit_ot.rows import RowStore
from mergekit_ot.settings import PlanSettings
from mergekit_ot.solvers import solve_plan
from mergekit_ot.structure import Structure, layer_tensor
from mergekit_ot.transport import transport_as_released, transport_with_plans


#: Regularisation of neuron and layer plans, and neurons touched per layer (Appendix A.3.4 and A.5 of the paper).
NEURON_REG, LAYER_REG, TOP_NEURONS = 0.1, 0.1, 128
#: Projection, site of its input and site of its output.
PROJECTIONS = {"q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("o_in", "attn_out")}
#: Donor layers below this share of a target layer's coupling are left out of its sum.
SMALL_SHARE = 1e-3


def pooled(store: RowStore, site: str, layer: int, counts: Sequence[int], device: str) -> torch.Tensor:
    """Mean over the rows of each text, `(n_texts, width)`."""
    if site == "attn_in":
        rows = store.read(f"stream.{2 * layer}", device)
        rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    elif site == "attn_out":
        rows = store.read(f"stream.{2 * layer + 1}", device) - store.read(f"stream.{2 * layer}", device)
    else:
        rows = store.read(f"{site}.{layer}", device)
    return torch.stack([part.mean(dim=0) for part in rows.split(list(counts))])


def layer_coupling(cost: torch.Tensor) -> torch.Tensor:
    """Entropic coupling of layers (Eq. 11-12), on the cost shifted and divided by its median."""
    shifted = cost - cost.min()
    scaled = shifted / shifted.median().clamp_min(1e-12)
    return solve_plan(scaled.double(), solver="entropic", reg=LAYER_REG, max_iterations=5000, name="layers").coupling


def solve_paper(
    target: RowStore,
    donor: RowStore,
    a: Structure,
    b: Structure,
    settings: PlanSettings,
    counts: Sequence[int],
    read_donor: Callable[[str], torch.Tensor | None],
    *,
    device: str = "cpu",
    quiet: bool = False,
) -> PlanBundle:
    """Solve all layer pairs and store the transported rows or columns of every attention weight.

    Args:
        counts (`Sequence[int]`): matched rows of each text, for pooling.
        read_donor (`Callable[[str], torch.Tensor | None]`): donor weights by name.
    """
    released = settings.preset == "paper-released"
    n_donor = min(a.n_layers, b.n_layers) if released else b.n_layers
    bundle = PlanBundle({}, {"kind": "paper", "layer_map": [None] * a.n_layers, "layers": {}})
    couplings: dict[str, list[list[float]]] = {}
    for kind, sites in tqdm(PROJECTIONS.items(), desc="paper plans", disable=quiet):
        plans = {site: _all_pairs(target, donor, site, a.n_layers, n_donor, counts, device) for site in set(sites)}
        costs = [_costs(plans[site], a.n_layers, n_donor) for site in sites]
        pre, post = (layer_coupling(cost) for cost in costs)
        shares = (pre * post).sqrt() * a.n_layers  # Eq. 13, with rows that sum to about one
        if not released:
            shares = shares / shares.sum(dim=1, keepdim=True)
        couplings[kind] = shares.tolist()
        for i in range(a.n_layers):
            top = _loudest(target, sites[1] if kind != "o" else sites[0], i, counts, device)
            weight, bias = _sum_layers(kind, i, plans, sites, shares[i], read_donor, released, device)
            part = f"self_attn.{kind}_proj"
            selected = weight[:, top] if kind == "o" else weight[top]
            bundle.tensors[f"paper.{layer_tensor(i, part)}.index"] = top.int().cpu()
            bundle.tensors[f"paper.{layer_tensor(i, part)}.weight"] = selected.float().cpu().contiguous()
            if bias is not None and kind != "o":
                bundle.tensors[f"paper.{layer_tensor(i, part)}.bias"] = bias[top].float().cpu().contiguous()
    bundle.info |= {
        "target": a.summary(),
        "donor": b.summary(),
        "settings": settings.to_dict(),
        "layer_coupling": couplings,
    }
    return bundle


def paper_weight(bundle: PlanBundle, name: str, target: torch.Tensor) -> torch.Tensor | None:
    """The transported tensor of a paper bundle: the target's own outside the selected rows (columns for o)."""
    part, _, kind = name.rpartition(".")
    stored = bundle.tensors.get(f"paper.{part}.{kind}")
    if stored is None:
        return None
    index = bundle.tensors[f"paper.{part}.index"].long().to(target.device)
    result = target.to(torch.promote_types(target.dtype, torch.float32), copy=True)
    stored = stored.to(result)
    if part.endswith("o_proj"):
        result[:, index] = stored
    else:
        result[index] = stored
    return result


def _all_pairs(target, donor, site, n_target, n_donor, counts, device) -> dict[tuple[int, int], TransportPlan]:
    donors = [pooled(donor, site, j, counts, device) for j in range(n_donor)]
    plans = {}
    for i in range(n_target):
        rows = pooled(target, site, i, counts, device)
        for j, other in enumerate(donors):
            cost = correlation_cost(correlation(rows, other))
            plans[i, j] = solve_plan(
                cost, solver="entropic", reg=NEURON_REG, max_iterations=200, allow_not_converged=True, name=site
            )
    return plans


def _costs(plans: dict[tuple[int, int], TransportPlan], n_target: int, n_donor: int) -> torch.Tensor:
    """Layer costs (Eq. 10)."""
    return torch.tensor([[plans[i, j].evidence.cost for j in range(n_donor)] for i in range(n_target)])


def _loudest(store: RowStore, site: str, layer: int, counts: Sequence[int], device: str) -> torch.Tensor:
    """Channels of largest mean magnitude (Appendix A.5), in increasing order."""
    size = pooled(store, site, layer, counts, device).abs().mean(dim=0)
    return size.topk(min(TOP_NEURONS, len(size))).indices.sort().values


def _sum_layers(kind, layer, plans, sites, shares, read_donor, released, device):
    """Weighted sum over donor layers (Eq. 16)."""
    carry = transport_as_released if released else transport_with_plans
    weight, bias = 0.0, None
    for j, share in enumerate(shares.tolist()):
        if share < SMALL_SHARE:
            continue
        in_plan, out_plan = plans[sites[0]][layer, j], plans[sites[1]][layer, j]
        part = layer_tensor(j, f"self_attn.{kind}_proj")
        weight = weight + share * carry(read_donor(f"{part}.weight").to(device).float(), out_plan, in_plan)
        own = read_donor(f"{part}.bias")
        if own is not None:
            out_map = out_plan.coupling if released else out_plan.to_target
            bias = (0.0 if bias is None else bias) + share * (out_map @ own.to(device).float())
    return weight, bias
