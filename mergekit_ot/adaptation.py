r"""Residual-frozen adaptation: fine-tune the target's weights around a fixed transported part, then fold.

    W = (1 - α) W_base + α ΔW,   ΔW frozen,   W_base trained      (Eq. 15, 18 and 22 of the paper)

Done with PyTorch's own parametrizations, so optimisers, trainers and PEFT see an ordinary module whose `weight` is W and
whose trained tensor is W_base.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize


class FrozenResidual(nn.Module):
    """The map from W_base to W.

    Args:
        transported (`torch.Tensor`): ΔW, kept as a buffer that no optimiser sees.
        alpha (`float`): share of ΔW, in (0, 1).
    """

    def __init__(self, transported: torch.Tensor, alpha: float):
        super().__init__()
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must lie strictly between 0 and 1 to leave a trainable part, got {alpha}.")
        self.alpha = alpha
        self.register_buffer("transported", transported, persistent=False)

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """W from W_base, same shape and dtype."""
        return torch.lerp(base, self.transported.to(base), self.alpha)


def attach_residuals(
    model: nn.Module,
    transport: Callable[[str, torch.Tensor], torch.Tensor | None],
    alpha: float | Callable[[str], float],
) -> list[str]:
    """Put the frozen residual on every linear weight that has a transported counterpart.

    Args:
        model (`nn.Module`): the target model. Modified.
        transport (`Callable[[str, torch.Tensor], torch.Tensor | None]`): e.g. `Transporter.transport`.
        alpha (`float | Callable[[str], float]`): share of ΔW, for all tensors or by checkpoint name; 0 leaves a tensor
            alone.

    Returns:
        `list[str]`: names of the modules that now carry one.
    """
    attached = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or parametrize.is_parametrized(module):
            continue
        share = alpha(f"{name}.weight") if callable(alpha) else alpha
        transported = transport(f"{name}.weight", module.weight.detach()) if share else None
        if transported is not None:
            residual = FrozenResidual(transported.to(module.weight), share)
            parametrize.register_parametrization(module, "weight", residual, unsafe=True)
            attached.append(name)
    return attached


def fold_residuals(model: nn.Module) -> int:
    """Replace every parametrized weight by its value W, leaving an ordinary model.

    Returns:
        `int`: weights folded.
    """
    count = 0
    for module in list(model.modules()):
        if parametrize.is_parametrized(module) and "weight" in module.parametrizations:
            if any(isinstance(part, FrozenResidual) for part in module.parametrizations["weight"]):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
                count += 1
    return count
