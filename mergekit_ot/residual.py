"""One map for the residual stream, shared by all layers.

Every block reads and writes the same stream, so its basis must be translated the same way everywhere. After the norm
gains are folded into the readers, pre-norm models can rotate this stream freely; channels of two independently trained
models therefore need not correspond at all, and `auto` decides from held-out rows whether they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_ot.costs import correlation_cost
from mergekit_ot.procrustes import MapPair, explained_both_ways, simplest, two_scale_procrustes
from mergekit_ot.rows import RowStore
from mergekit_ot.solvers import solve_plan


#: From the simplest to the most flexible, as `auto` tries them.
RESIDUAL_MAPS = ("ot", "signed", "procrustes")
#: Rounds of reweighting depths by how well they fit.
ROBUST_ROUNDS = 4
#: Streams that agree this well at the embeddings are one stream in two bases: one scale holds at all depths.
SAME_STREAM = 0.9
#: A scale this close to one is the drift of fine-tuning, not another unit.
SCALE_DRIFT = 0.05


@dataclass(frozen=True)
class ResidualFit:
    """The chosen map and why.

    Args:
        maps ([`MapPair`]): the two directions, on RMS-normalised rows.
        scores (`dict[str, float]`): held-out R² of every candidate, depths weighted as in the fit.
        depth_scores (`list[float]`): held-out R² of the chosen map at each fitted depth.
        scales (`list[float]`): target over donor RMS of the raw stream at each fitted depth.
        same_stream (`bool`): whether the embeddings already agree, so that one scale holds everywhere.
    """

    maps: MapPair
    scores: dict[str, float]
    depth_scores: list[float]
    scales: list[float]
    same_stream: bool


def fitted_depths(pairs: Sequence[tuple[int, int]], n_target: int, n_donor: int) -> list[tuple[int, int]]:
    """Depths compared: the embeddings, the middle of every matched layer, and the end."""
    middle = [(2 * i + 1, 2 * j + 1) for i, j in pairs]
    return [(0, 0), *middle, (2 * n_target, 2 * n_donor)]


def normalised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over their RMS, in float64, and that RMS `(n_rows,)`."""
    rms = rows.double().square().mean(dim=1).sqrt().clamp_min(1e-12)
    return rows.double() / rms[:, None], rms


class _Moments:
    """Second moments of both streams at one depth, from the fit rows, and the held-out rows for the score."""

    def __init__(self, target: torch.Tensor, donor: torch.Tensor, n_fit: int):
        target, target_rms = normalised(target)
        donor, donor_rms = normalised(donor)
        self.scale = float((target_rms / donor_rms).median())
        x, y = target[:n_fit], donor[:n_fit]
        self.n, self.cross, self.target, self.donor = n_fit, x.T @ y / n_fit, x.T @ x / n_fit, y.T @ y / n_fit
        self.target_mean, self.donor_mean = x.mean(dim=0), y.mean(dim=0)
        self.held_target, self.held_donor = target[n_fit:].float(), donor[n_fit:].float()

    def correlation(self) -> torch.Tensor:
        covariance = self.cross - torch.outer(self.target_mean, self.donor_mean)
        target_var = (self.target.diagonal() - self.target_mean.square()).clamp_min(0).sqrt()
        donor_var = (self.donor.diagonal() - self.donor_mean.square()).clamp_min(0).sqrt()
        spread = torch.outer(target_var, donor_var)
        return torch.where(spread > 1e-12, covariance / spread.clamp_min(1e-12), 0.0).clamp(-1, 1)


def _fit(kind: str, depths: Sequence[_Moments], weights: torch.Tensor, keep_size: bool = False) -> MapPair:
    shares = (weights / weights.sum()).tolist()
    if kind == "procrustes":
        cross, target, donor = (
            sum(w * getattr(depth, name) for w, depth in zip(shares, depths)) for name in ("cross", "target", "donor")
        )
        return two_scale_procrustes(cross, target, donor, keep_size=keep_size)
    similarity = sum(w * depth.correlation() for w, depth in zip(shares, depths))
    signed = kind == "signed"
    plan = solve_plan(correlation_cost(similarity, signed=signed), name="residual stream")
    signs = torch.where(similarity < 0, -1.0, 1.0).to(similarity) if signed else torch.ones_like(similarity)
    return MapPair(kind, plan.to_target * signs, plan.to_donor * signs.T)


def _robust_fit(kind: str, depths: Sequence[_Moments]) -> tuple[MapPair, torch.Tensor, list[float]]:
    """Fit, then weight every depth by the inverse square of its unexplained share: depths that agree set the basis.

    Fine-tuning moves late depths and leaves the embeddings, so for relatives the weights settle on the depths whose
    relation is exact; between unrelated models all depths fit alike and the weights stay even.
    """
    weights = torch.ones(len(depths), dtype=torch.float64)
    for _ in range(ROBUST_ROUNDS):
        pair = _fit(kind, depths, weights)
        scores = [explained_both_ways(pair, depth.held_target, depth.held_donor) for depth in depths]
        weights = robust_weights(scores)
    return pair, weights, scores


def robust_weights(scores: Sequence[float]) -> torch.Tensor:
    """Inverse squares of the unexplained shares, summing to one."""
    weights = (1.0 - torch.tensor(scores, dtype=torch.float64).clamp(0.0, 1.0) + 1e-6) ** -2
    return weights / weights.sum()


def fit_residual(
    target: RowStore,
    donor: RowStore,
    depths: Sequence[tuple[int, int]],
    *,
    kind: str = "auto",
    n_fit: int,
    device: str = "cpu",
) -> ResidualFit:
    """Fit the stream map.

    Args:
        target, donor ([`RowStore`]): matched rows of both models.
        depths (`Sequence[tuple[int, int]]`): depths to compare, the embeddings first (see `fitted_depths`).
        kind (`str`, *optional*, defaults to `"auto"`): `"ot"`, `"signed"`, `"procrustes"`, or `"auto"` for the
            simplest that explains the held-out rows.
        n_fit (`int`): leading rows used for fitting; the rest are held out.

    Raises:
        `ValueError`: for an unknown kind.
    """
    if kind != "auto" and kind not in RESIDUAL_MAPS:
        raise ValueError(f"residual_map must be 'auto' or one of {RESIDUAL_MAPS}, got {kind!r}.")
    moments = [
        _Moments(target.read(f"stream.{i}", device), donor.read(f"stream.{j}", device), n_fit) for i, j in depths
    ]
    kinds = RESIDUAL_MAPS if kind == "auto" else (kind,)
    fits = [_robust_fit(name, moments) for name in kinds]
    scores = [float((weights * torch.tensor(values)).sum()) for _, weights, values in fits]
    chosen = simplest(scores)
    pair, weights, depth_scores = fits[chosen]
    scales = [depth.scale for depth in moments]
    same_stream = depth_scores[0] >= SAME_STREAM
    if same_stream:
        pair = _fit(kinds[chosen], moments, weights, keep_size=True)
        scales = [1.0 if abs(scales[0] - 1.0) < SCALE_DRIFT else scales[0]] * len(scales)
    return ResidualFit(pair, dict(zip(kinds, scores)), depth_scores, scales, same_stream)


def refine_residual(fit: ResidualFit, vectors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> ResidualFit:
    """Fit the rotation of a relative again on matched weight vectors, keeping the scales found on activations.

    Vectors that read the stream turn with it, and fine-tuning moves them less, and less systematically, than it moves
    activations (rotated fine-tune of a tiny model: error of the rotation 0.038 from embeddings, 0.011 from vectors).
    Does nothing for unrelated streams, for channel maps, which are exact or not at all, and for too few vectors.

    Args:
        fit ([`ResidualFit`]): the fit on activations.
        vectors (`Iterable[tuple[torch.Tensor, torch.Tensor]]`): target vectors `(n, width_target)` and matching donor
            vectors `(n, width_donor)`, streamed.
    """
    if not (fit.same_stream and fit.maps.kind == "procrustes"):
        return fit
    moments, count = [0.0, 0.0, 0.0], 0
    for target, donor in vectors:
        x, y = target.double().cpu(), donor.double().cpu()
        moments = [total + new for total, new in zip(moments, (x.T @ y, x.T @ x, y.T @ y))]
        count += len(x)
    if count < 4 * max(fit.maps.to_target.shape):
        return fit
    refined = two_scale_procrustes(*moments)
    sizes = [float(old.norm() / new.norm()) for old, new in zip(fit.maps.directions, refined.directions)]
    return replace(fit, maps=MapPair("procrustes", refined.to_target * sizes[0], refined.to_donor * sizes[1]))
