r"""The Multi-Lingual Consistency loss and its companions, as functions of tensors.

No model, tokenizer or trainer is known here. A *group* is one prompt in several languages; its unit-normalised
representations are the rows of \\( Z \in \mathbb{R}^{M \times d} \\) (the paper writes them as columns).

Paper: Align Once, Benefit Multilingually, arXiv:2602.16660.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


SIGMA_NORMS = ("top", "none")
SOLVERS = ("gram64", "svd")
NORM_EPS = 1e-6  # below this length a vector has no direction; larger than fp32 noise, so its gradient stays below 1e6
EIGENVALUE_FLOOR = (
    1e-12  # sigma below 1e-6 is rounding of the float64 Gram matrix: no gradient there, no inf from sqrt
)


class ConsistencyLoss(NamedTuple):
    """What one evaluation of the loss found.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean over all groups; a group with fewer than two languages adds zero.
        per_group (`torch.Tensor` of shape `(N,)`): the loss of each group.
        singular_values (`torch.Tensor` of shape `(N, M)`): descending; zero beyond the languages of a group.
        energy (`torch.Tensor` of shape `(N,)`): share of the first direction, `sigma_1^2 / k`, in `[1/k, 1]`.
        min_cosine (`torch.Tensor` of shape `(N,)`): smallest cosine between two languages of a group; 1 if alone.
    """

    loss: torch.Tensor
    per_group: torch.Tensor
    singular_values: torch.Tensor
    energy: torch.Tensor
    min_cosine: torch.Tensor


def unit_rows(representations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normalise rows in float32 or better and zero the missing ones.

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool): which rows exist.

    Returns:
        `torch.Tensor` of shape `(N, M, d)`, float32 (float64 for float64 input).
    """
    if representations.dtype in (torch.float16, torch.bfloat16):
        representations = representations.float()
    representations = representations.masked_fill(~mask.unsqueeze(-1), 0.0)
    return F.normalize(representations, dim=-1, eps=NORM_EPS)


def singular_values(units: torch.Tensor, solver: str = "gram64") -> torch.Tensor:
    r"""Singular values of each group, largest first, always `M` of them.

    `gram64` takes square roots of the eigenvalues of \\( Z Z^\top \\) in float64. In float32 that product loses half
    the digits: near rank 1 (spread 1e-3) the gradient was 32 % off, in float64 3.5e-5; and from five languages on it is
    faster than `svd`. Only values are differentiated, so repeated ones are harmless.

    Args:
        units (`torch.Tensor` of shape `(N, M, d)`): unit or zero rows.
        solver (`str`, *optional*, defaults to `"gram64"`): `"gram64"` or `"svd"` (in the dtype of `units`).

    Returns:
        `torch.Tensor` of shape `(N, M)` in the dtype of `units`.

    Raises:
        `ValueError`: for an unknown solver.
    """
    if solver == "svd":
        values = torch.linalg.svdvals(units)
        return F.pad(values, (0, units.shape[1] - values.shape[-1]))
    if solver != "gram64":
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
    doubles = units.double()
    eigenvalues = torch.linalg.eigvalsh(doubles @ doubles.transpose(1, 2)).flip(-1)
    return eigenvalues.clamp_min(EIGENVALUE_FLOOR).sqrt().to(units.dtype)


def consistency_loss(
    representations: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 0.2,
    sigma_norm: str = "top",
    signed: bool = False,
    solver: str = "gram64",
) -> ConsistencyLoss:
    r"""Cross-entropy of the softmax over singular values against the first one.

    \\( L = -\frac1N \sum_n \log \mathrm{softmax}_j(\sigma^{(n)}_j / \tau)_1 \\). By Eckart-Young, raising the first
    singular value of unit rows lowers the distance to the nearest rank-1 group (Proposition 1).

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): one row per prompt and language, any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool, *optional*): which languages exist. All, if not given.
        temperature (`float`, *optional*, defaults to 0.2): tau.
        sigma_norm (`str`, *optional*, defaults to `"top"`): `"top"` divides by the stop-gradient of the first singular
            value, as the authors' program does; `"none"` is the printed formula, which at 10 languages and tau 0.2 is
            already saturated (0.0025 at a cosine of one half, where `"top"` still gives 0.24).
        signed (`bool`, *optional*, defaults to `False`): put `|sum of rows| / sqrt(k)` in the first logit. It equals
            `sigma_1` only if all rows are equal; singular values alone cannot see a row that points the other way.
        solver (`str`, *optional*, defaults to `"gram64"`): see [`singular_values`].

    Returns:
        [`ConsistencyLoss`] in float32 (float64 for float64 input).

    Raises:
        `ValueError`: for a shape that is not `(N, M, d)`, a temperature that is not positive, or an unknown option.

    Closed forms (tested), with `k` languages: collinear rows `log(1 + (k-1) exp(-1/tau))` (`"top"`), orthonormal rows
    `log k`, and with `signed` and `f` flipped rows `log(1 + (k-1) exp(-|1-2f/k|/tau))`.
    """
    _check(representations, temperature, sigma_norm)
    if mask is None:
        mask = representations.new_ones(representations.shape[:2], dtype=torch.bool)
    with torch.autocast(representations.device.type, enabled=False):
        units = unit_rows(representations, mask)
        sigma = singular_values(units, solver)
        k = mask.sum(1)
        exists = torch.arange(sigma.shape[1], device=sigma.device) < k.unsqueeze(1)
        scale = temperature * (sigma[:, :1].detach() if sigma_norm == "top" else 1.0)
        first = _resultant(units, k) if signed else sigma[:, 0]
        logits = torch.cat([first.unsqueeze(1), sigma[:, 1:]], 1) / scale
        logits = logits.masked_fill(~exists, -torch.inf)
        counts = k >= 2
        logits = torch.where(counts.unsqueeze(1), logits, torch.zeros_like(logits))
        per_group = torch.where(counts, torch.logsumexp(logits, 1) - logits[:, 0], 0.0)
        values = sigma.detach().masked_fill(~exists, 0.0)
        energy = values[:, 0].square() / k.clamp_min(1)
        return ConsistencyLoss(per_group.mean(), per_group, values, energy, _min_cosine(units.detach(), mask))


def pairwise_cosine_loss(representations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over groups of one minus the mean cosine between their languages: the paper's "hard constraint" ablation.

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool): which languages exist.

    Returns:
        `torch.Tensor` of shape `()`: in `[0, 2]`; groups with fewer than two languages add zero.
    """
    units = unit_rows(representations, mask)
    k = mask.sum(1)
    pairs = units.sum(1).square().sum(-1) - k  # sum of cosines over ordered pairs of different languages
    mean_cosine = pairs / (k * (k - 1)).clamp_min(1)
    return torch.where(k >= 2, 1.0 - mean_cosine, 0.0).mean()


def repulsion_loss(representations: torch.Tensor, mask: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    r"""Soft maximum of the cosine between *different* prompts, over all languages.

    \\( \tau \log \mathrm{mean}_{(n,l),(n',l'),\, n \ne n'} \exp(\cos / \tau) \\): it lies between the mean and the
    maximum cosine, so it is 1 when every prompt has collapsed to one direction. The consistency loss is blind to that.

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool): which languages exist.
        temperature (`float`, *optional*, defaults to 0.2).

    Returns:
        `torch.Tensor` of shape `()`: zero (with a graph) when the batch holds a single prompt.
    """
    cosines, different = _cosines_between_groups(unit_rows(representations, mask), mask)
    if not different.any():
        return representations.sum() * 0.0
    logits = (cosines / temperature).masked_fill(~different, -torch.inf)
    return temperature * (torch.logsumexp(logits.flatten(), 0) - different.sum().log())


def contrast_loss(
    representations: torch.Tensor, mask: torch.Tensor, anchors: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    r"""Cross-entropy of finding, for each translation, its own anchor prompt among those of the batch.

    \\( -\log \mathrm{softmax}_{n'}(\cos(z_{n,l}, z_{n',a}) / \tau)_n \\), mean over the translations of a row, then over
    rows. A translation that says nothing about its anchor costs the logarithm of the number of anchors, and nothing lowers
    that but the anchor's own content: unlike the consistency loss it has nothing to gain from shuffled translations, nor
    from a common direction.

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool): which languages exist.
        anchors (`torch.Tensor` of shape `(N, M)`, bool): which entries are the anchor language, at most one in a row.
        temperature (`float`, *optional*, defaults to 0.1).

    Returns:
        `torch.Tensor` of shape `()`: rows without an anchor or a translation add zero; zero (with a graph) when fewer
        than two rows have an anchor.
    """
    units = unit_rows(representations, mask)
    anchors = anchors & mask
    has_anchor = anchors.any(1)
    if has_anchor.sum() < 2:
        return representations.sum() * 0.0
    keys = (units * anchors.unsqueeze(-1)).sum(1)  # (N, d)
    logits = (units @ keys.T / temperature).masked_fill(~has_anchor, -torch.inf)  # (N, M, N)
    own = torch.arange(len(units), device=units.device).view(-1, 1, 1).expand(-1, units.shape[1], 1)
    counted = mask & ~anchors & has_anchor.unsqueeze(1)
    losses = torch.logsumexp(logits, -1) - logits.gather(2, own).squeeze(2)
    per_row = torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp_min(1)
    return per_row.mean()


def cross_prompt_cosine(representations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cosine between different prompts over all languages: the collapse alarm. NaN for a single prompt.

    Args:
        representations (`torch.Tensor` of shape `(N, M, d)`): any floating dtype.
        mask (`torch.Tensor` of shape `(N, M)`, bool): which languages exist.
    """
    cosines, different = _cosines_between_groups(unit_rows(representations, mask), mask)
    return cosines.masked_fill(~different, 0.0).sum() / different.sum()


def _check(representations: torch.Tensor, temperature: float, sigma_norm: str) -> None:
    if representations.ndim != 3:
        shape = tuple(representations.shape)
        raise ValueError(f"representations must have shape (groups, languages, features), got {shape}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if sigma_norm not in SIGMA_NORMS:
        raise ValueError(f"sigma_norm must be one of {SIGMA_NORMS}, got {sigma_norm!r}.")


def _resultant(units: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Length of the sum of a group's rows over sqrt(k): (N,)."""
    squared = units.double().sum(1).square().sum(-1) / k.clamp_min(1)
    return squared.clamp_min(EIGENVALUE_FLOOR).sqrt().to(units.dtype)


def _min_cosine(units: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    cosines = units @ units.transpose(1, 2)  # (N, M, M)
    valid = mask.unsqueeze(1) & mask.unsqueeze(2)
    return cosines.masked_fill(~valid, 1.0).amin((1, 2)).clamp(max=1.0)


def _cosines_between_groups(units: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all rows with all rows, and which of them compare two existing rows of different groups."""
    n, m, d = units.shape
    flat, exists = units.reshape(n * m, d), mask.reshape(n * m)
    group = torch.arange(n, device=units.device).repeat_interleave(m)
    different = (group.unsqueeze(0) != group.unsqueeze(1)) & exists.unsqueeze(0) & exists.unsqueeze(1)
    return flat @ flat.T, different
