"""Choose a layer input's map in closed form from moments: no gradient, seconds per model.

Which parts are fitted is the config's choice; every part keeps the layer exact before rounding (affine_map.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_freeact.moments import Moments
from optimum_freeact.numerics.hadamard import flat_rotation, random_orthogonal
from optimum_freeact.numerics.kronecker import factor_pair, partial_traces
from optimum_freeact.numerics.matrix_mean import damped, inverse_geometric_mean, spd_power
from optimum_freeact.transforms.affine_map import InputMap


KRONECKER_SWEEPS = 4  # alternating minimisation; the product changes by under 1 % after the third (SmolLM2)


@dataclass(frozen=True)
class MapSpec:
    """What to fit.

    Args:
        transform (`str`): `"none"`, `"hadamard"`, `"kronecker"` or `"orthogonal"`.
        channel_scale (`str`): `"none"`, `"smoothquant"` or `"closed_form"`.
        centring (`str`): `"none"`, `"shared"` or `"per_type"`.
        low_rank (`int`): Rank of the high-precision branch.
        closed_form (`bool`): Fit Kronecker factors to the moments; otherwise they only rotate.
        smooth_alpha (`float`): Migration strength of SmoothQuant scales.
        damping (`float`): Share of the mean diagonal added to second moments.
        type_rank (`int`): Further columns of the branch for each type.
    """

    transform: str
    channel_scale: str
    centring: str
    low_rank: int
    closed_form: bool
    smooth_alpha: float = 0.5
    damping: float = 1e-3
    type_rank: int = 0


@dataclass
class InputStatistics:
    """Moments of one input about the chosen centres, and of the weights that read it, float64.

    Args:
        c (`torch.Tensor` of shape `(d, d)`): Activation second moments about the type means, mixed over types.
        h (`torch.Tensor` of shape `(d, d)`): W^T W summed over the linears that share the input, each normalised by
            its output energy.
        mean (`torch.Tensor` of shape `(n_types or 1, d)`, *optional*): The centres.
        paired (`tuple` of two `torch.Tensor` of shape `(d, d)`, *optional*): Second moments of the actual inputs, and of
            full-precision ones with actual ones. Types at their own energy: a correction that is fitted with the sink
            made as small as the other types ruins the sink, and with it the model.
        parts (`dict[int, torch.Tensor]`, *optional*): What each type that was seen contributes to `c`.
    """

    c: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor | None
    paired: tuple[torch.Tensor, torch.Tensor] | None
    peak: torch.Tensor | None
    weight_peak: torch.Tensor
    parts: dict[int, torch.Tensor] | None = None


def gather_statistics(moments: Moments, weights: list[torch.Tensor], spec: MapSpec) -> InputStatistics:
    """Centre the moments as the config asks and mix the types.

    Types are mixed by their share of tokens after each is normalised by its own output energy tr(C_k H), so that one
    sink token with a thousand times the energy of the others does not decide the transform of all.
    """
    # products in float32: H weighs errors against each other, its last digits decide nothing
    grams = [(w.float().mT @ w.float()).double() for w in weights]
    h = sum(grams)
    kinds = [k for k in range(moments.n_types) if moments.count[k] > 0]
    if spec.centring == "per_type":
        mean = torch.stack([moments.mean(k) for k in range(moments.n_types)])
    elif spec.centring == "shared":
        mean = moments.mean().unsqueeze(0)
    else:
        mean = None
    zero = torch.zeros_like(moments.shift[0])
    c, actual, cross, total = torch.zeros_like(h), torch.zeros_like(h), torch.zeros_like(h), moments.count.sum()
    energies, parts = [], {}
    for k in kinds:
        centre = zero if mean is None else mean[min(k, len(mean) - 1)]
        covariance = moments.covariance(k, centre)
        energy = (covariance * h).sum().clamp_min(torch.finfo(torch.float64).tiny)
        share = moments.count[k] / total / energy
        energies.append((moments.count[k] / total, energy))
        c += share * covariance
        if spec.type_rank:
            parts[k] = share * covariance
        if moments.paired:
            centre_y = zero if mean is None else moments.mean_of_pair(k if len(mean) > 1 else None)
            actual += moments.count[k] / total * covariance
            cross += moments.count[k] / total * moments.cross_covariance(k, centre_y, centre)
    scale = sum(share * energy for share, energy in energies)  # back to the units of the activations
    if len(grams) > 1:  # linears count by their relative output error: a weak k_proj as much as a strong q_proj
        outputs = [(c * gram).sum().clamp_min(torch.finfo(torch.float64).tiny) for gram in grams]
        h = sum(gram / output for gram, output in zip(grams, outputs)) * sum(outputs) / len(outputs)
    weight_peak = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()
    paired = (actual, cross) if moments.paired else None
    peak = None if moments.peak is None else moments.peak.double()
    scaled = {k: part * scale for k, part in parts.items()} if spec.type_rank else None
    return InputStatistics(c * scale, h, mean, paired, peak, weight_peak, scaled)


def balanced_channel_scale(c: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Diagonal member of the optimal family: s_j = (H_jj / C_jj)^(1/4), which equalises both sides' energies."""
    return (damped(h).diagonal() / damped(c).diagonal()).pow(0.25)


def smoothquant_scale(peak: torch.Tensor, weight_peak: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant (2211.10438, Eq. 4) as a multiplier of the activations: s_j = max|W_j|^(1-a) / max|x_j|^a."""
    return weight_peak.clamp_min(1e-5).pow(1 - alpha) / peak.clamp_min(1e-5).pow(alpha)


# kept energy relative to exact eigenvectors, SmolLM2 inputs, rank 24: .981 to .994 after 2, .998 to .9998 after 4
SUBSPACE_ITERATIONS = 4


def top_directions(c: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal basis of (nearly) the `rank` directions with the most energy, shape `(d, rank)`.

    Subspace iteration (Halko, Martinsson and Tropp, 0909.4061, Alg. 4.4) with half as many extra columns: any orthonormal
    basis keeps the layer exact, so the last digits of an eigenvector are not worth a full decomposition, which takes
    seconds at d = 1536 on a CPU.
    """
    n = len(c)
    if n <= 4 * rank:
        return torch.linalg.eigh(c)[1][:, -rank:]
    start = torch.randn(n, rank + rank // 2 + 8, generator=torch.Generator().manual_seed(0), dtype=c.dtype)
    basis = torch.linalg.qr(start.to(c.device))[0]
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(c @ basis)[0]
    return basis @ torch.linalg.eigh(basis.mT @ c @ basis)[1][:, -rank:]


def low_rank_and_scale(stats: InputStatistics, spec: MapSpec) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Channel scale and low-rank basis, alternated twice because each changes what the other sees."""
    n = len(stats.c)
    if spec.channel_scale == "smoothquant":
        scale = smoothquant_scale(stats.peak, stats.weight_peak, spec.smooth_alpha)
    elif spec.channel_scale == "closed_form":
        scale = balanced_channel_scale(stats.c, stats.h)
    else:
        scale = None
    rank = min(spec.low_rank, n // 8)
    if rank == 0:
        return scale, None
    for last in (False, True):
        scaled = stats.c if scale is None else stats.c * scale[:, None] * scale
        basis = top_directions(scaled, rank)
        if last or spec.channel_scale != "closed_form":
            return scale, basis
        image = scaled @ basis  # diagonal of (I - U U^T) S (I - U U^T) without forming it
        kept = (basis @ (basis.mT @ image) * basis).sum(1)
        residual = (scaled.diagonal() - 2 * (image * basis).sum(1) + kept) / scale.square()
        scale = balanced_channel_scale(torch.diag(residual), stats.h)
    raise AssertionError("unreachable")


def kronecker_factors(c: torch.Tensor, h: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors G_a, G_b that minimise tr(C G_a (x) G_b) tr(H (G_a (x) G_b)^-1), by alternating closed forms."""
    a, b = factor_pair(len(c))
    left = torch.eye(a, dtype=c.dtype, device=c.device)
    right = torch.eye(b, dtype=c.dtype, device=c.device)
    c, h = damped(c, damping), damped(h, damping)
    for _ in range(KRONECKER_SWEEPS):
        left = inverse_geometric_mean(
            partial_traces(c, left, right)[0], partial_traces(h, torch.linalg.inv(left), torch.linalg.inv(right))[0]
        )
        right = inverse_geometric_mean(
            partial_traces(c, left, right)[1], partial_traces(h, torch.linalg.inv(left), torch.linalg.inv(right))[1]
        )
        left, right = left / left.diagonal().mean(), right * left.diagonal().mean()
    return left, right


def own_directions(
    stats: InputStatistics, scale: torch.Tensor | None, basis: torch.Tensor | None, rank: int, n_types: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared basis with `rank` columns more for each type: the strongest directions of what the basis leaves of it.

    Returns:
        The basis `(d, r + n_types * rank)`, and which columns each type uses, `(n_types, ...)`. A type that was not seen
        uses the shared ones only.
    """
    n = len(stats.c)
    shared = torch.zeros(n, 0, dtype=stats.c.dtype, device=stats.c.device) if basis is None else basis
    columns, uses = [shared], torch.zeros(n_types, shared.shape[1] + n_types * rank, dtype=torch.bool)
    uses[:, : shared.shape[1]] = True
    parts = stats.parts or {}
    for kind in range(n_types):
        own = torch.zeros(n, rank, dtype=shared.dtype, device=shared.device)
        if kind in parts:
            c = parts[kind] if scale is None else parts[kind] * scale[:, None] * scale
            left = c - shared @ (shared.mT @ c)
            own = top_directions(left - (left @ shared) @ shared.mT, rank)
            start = shared.shape[1] + kind * rank
            uses[kind, start : start + rank] = True
        columns.append(own)
    return torch.cat(columns, 1), uses.to(shared.device)


def fit_map(stats: InputStatistics, spec: MapSpec, generator: torch.Generator, n_types: int = 1) -> InputMap:
    """The map of one input.

    Args:
        stats ([`InputStatistics`]): Moments.
        spec ([`MapSpec`]): What to fit.
        generator (`torch.Generator`): CPU generator of the rotations.
        n_types (`int`, *optional*, defaults to 1): Token types.
    """
    n, device = len(stats.c), stats.c.device
    scale, basis = low_rank_and_scale(stats, spec)
    uses = None
    if spec.type_rank:
        basis, uses = own_directions(stats, scale, basis, spec.type_rank, n_types)
    found = InputMap(mean=stats.mean, channel_scale=scale, basis=basis, uses=uses)
    if spec.transform == "orthogonal":
        found.dense = random_orthogonal(n, generator).to(device)
    elif spec.transform in ("hadamard", "kronecker"):
        a, b = factor_pair(n)
        left, right = flat_rotation(a, generator).to(device), flat_rotation(b, generator).to(device)
        if spec.transform == "kronecker" and spec.closed_form:
            c = found.transform_moments(stats.c)
            h = stats.h if scale is None else stats.h / scale[:, None] / scale
            g_left, g_right = kronecker_factors(c, h, spec.damping)
            left, right = spd_power(g_left, 0.5) @ left, spd_power(g_right, 0.5) @ right
        found.left, found.right = left, right
    return found
