r"""Express a donor weight in the target's channels, with the scaling that makes the result mean something.

A donor layer computes \\( y_B = W_B x_B \\). We want \\( W' \\) with \\( W' x_A \approx T y_B \\). Writing
\\( x_B \approx R x_A \\) gives \\( W' = T W_B R \\): the output side carries donor channels to target channels, the
input side target channels to donor channels. From couplings of uniform marginals that is

    W' = (n_A,out · Q_out) W_B (n_B,in · Q_inᵀ)

The released code of the paper multiplies by the bare couplings, which is smaller by n_A,out · n_B,in (docs/merge.md).
"""

from __future__ import annotations

import torch

from mergekit_ot.maps import DenseMap, LinearMap
from mergekit_ot.plan import TransportPlan


def transport_weight(weight: torch.Tensor, out_map: LinearMap, in_map: LinearMap) -> torch.Tensor:
    r"""Compute \\( T_\text{out} \, W_B \, R_\text{in} \\).

    Args:
        weight (`torch.Tensor` of shape `(n_out_donor, n_in_donor)`): donor weight, any floating dtype. Not modified.
        out_map ([`LinearMap`] of shape `(n_out_target, n_out_donor)`): donor to target, in the space the weight writes.
        in_map ([`LinearMap`] of shape `(n_in_donor, n_in_target)`): target to donor, in the space the weight reads.

    Returns:
        `torch.Tensor` of shape `(n_out_target, n_in_target)` in float32, or float64 when the weight is.

    Raises:
        `ValueError`: when a map does not fit the weight; the message holds all shapes.

    Identity: permutations give exactly `weight[out][:, in]` (tested).
    """
    if out_map.shape[1] != weight.shape[0] or in_map.shape[0] != weight.shape[1]:
        raise ValueError(
            f"Maps of shape {out_map.shape} (output) and {in_map.shape} (input) do not fit a weight of shape "
            f"{tuple(weight.shape)}; the output map needs {weight.shape[0]} columns, the input map {weight.shape[1]} rows."
        )
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if out_map.shape[0] * in_map.shape[0] <= out_map.shape[1] * in_map.shape[1]:  # the smaller product first
        return in_map.right(out_map.left(weight))
    return out_map.left(in_map.right(weight))


def transport_bias(bias: torch.Tensor, out_map: LinearMap) -> torch.Tensor:
    r"""Compute \\( T_\text{out} \, b_B \\), shape `(n_out_target,)`, in float32 or float64."""
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return out_map.left(bias.reshape(-1, 1)).reshape(-1)


def transport_with_plans(weight: torch.Tensor, out_plan: TransportPlan, in_plan: TransportPlan) -> torch.Tensor:
    r"""Compute \\( (n_{A,out} Q_{out}) \, W_B \, (n_{B,in} Q_{in}^\top) \\), the corrected form of the paper's Eq. 16."""
    return transport_weight(weight, DenseMap(out_plan.to_target), DenseMap(in_plan.to_donor))


def transport_as_released(weight: torch.Tensor, out_plan: TransportPlan, in_plan: TransportPlan) -> torch.Tensor:
    r"""Compute \\( Q_{out} W_B Q_{in}^\top \\) with bare couplings, the released arithmetic, for comparison only."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return out_plan.coupling.to(weight) @ weight @ in_plan.coupling.to(weight).T


def interpolate(target: torch.Tensor, transported: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""\\( (1-\alpha) W_A + \alpha W' \\) (Eq. 22 of the paper); `alpha=0` returns the target itself, byte for byte."""
    if alpha == 0.0:
        return target
    wide = target.to(torch.promote_types(target.dtype, transported.dtype))
    return torch.lerp(wide, transported.to(wide), alpha).to(target.dtype)
