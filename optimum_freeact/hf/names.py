"""Names of packed experts in a checkpoint.

transformers loads the experts of many published checkpoints from one tensor each into stacked parameters, and undoes that
when it saves. Packed experts are stacked for good: they are saved under the names that they have in the model.
"""

from __future__ import annotations

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from optimum_freeact.modules.experts import FreeActExperts


def keep_packed_experts(model: nn.Module) -> None:
    """Take from a model with packed experts the conversions that would take them apart; those of other names stay."""
    modules = [module for module in model.modules() if isinstance(module, FreeActExperts)]
    if not modules:
        return
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
    names = {name for module in modules for name in module.names}
    model._weight_conversions = [entry for entry in found if not _is_about(entry, names)]


def _is_about(entry, names: set[str]) -> bool:
    targets = entry.target_patterns if isinstance(entry, WeightConverter) else []
    return any(f".{name}" in target or target.endswith(name) for target in targets for name in names)
