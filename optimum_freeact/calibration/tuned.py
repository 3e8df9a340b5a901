"""Learned calibration of what a quantized linear adds in floating point, with its codes and its input's map as they are.

A row's scale, its share of the branch and its biases cost nothing to change after rounding. Trained against the block's
output they take back part of what all its roundings lost together, which no linear can see alone.
"""

from __future__ import annotations

import torch
from torch import nn

from optimum_freeact.calibration.precision import products
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.affine import dequantize
from optimum_freeact.transforms.affine_map import pick


class TunedLinear(nn.Module):
    """Differentiable twin of a filled [`FreeActLinear`]; its rounded weight is fixed.

    Args:
        target ([`FreeActLinear`]): With codes, scales, branch and biases; not prepared for a kernel.
    """

    def __init__(self, target: FreeActLinear):
        super().__init__()
        self.__dict__["target"] = target
        self.register_buffer("weight", target.transformed_weight(torch.float32), persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(target.out_features, device=self.weight.device))
        branch, bias = target.low_rank, target.bias_rows()
        branch = None if branch is None else branch.float() * target.low_rank_scale
        for name, start in (("branch", branch), ("bias", bias)):
            # changes in units of the column's (the text bias's) own size: one learning rate serves all
            unit = (
                None if start is None else (start[:1].mT if name == "bias" else start).square().mean(0).sqrt() + 1e-8
            )
            self.register_buffer(f"{name}_start", None if start is None else start.float().clone(), persistent=False)
            self.register_buffer(f"{name}_unit", unit, persistent=False)
            self.register_parameter(f"{name}_change", None if start is None else nn.Parameter(torch.zeros_like(start)))

    def branch(self) -> torch.Tensor | None:
        """L as it is now."""
        return None if self.branch_start is None else self.branch_start + self.branch_unit * self.branch_change

    def type_bias(self) -> torch.Tensor | None:
        """Biases of all types as they are now."""
        return None if self.bias_start is None else self.bias_start + self.bias_unit * self.bias_change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `FreeActLinear.forward`, with gradients."""
        with products("highest", x.device):
            rounded = self.target.source(x)
        values = rounded.values if rounded.qparams is None else dequantize(rounded.values, rounded.qparams)
        y = nn.functional.linear(values.float(), self.weight) * self.log_scale.exp()
        branch = self.branch()
        if branch is not None:
            y = y + rounded.low_rank.float() @ branch.mT
        if self.bias_start is not None:
            y = y + pick(self.type_bias(), rounded.types)
        return y.to(x.dtype)

    @torch.no_grad()
    def write_back(self) -> None:
        """Store what was learned in the target."""
        target = self.target
        target.qscale.mul_(self.log_scale.exp()[:, None])
        if self.branch_start is not None:
            target.set_low_rank(self.branch())
        if self.bias_start is not None:
            target.set_bias_rows(self.type_bias())
