"""Optimal-transport merging across architectures for mergekit.

`register()` makes `merge_method: transport` known to mergekit; `mergekit-ot run recipe.yml out/` does the rest.
Names are imported on first use, so that importing this package loads neither torch nor mergekit.
"""

from importlib import import_module


_EXPORTS = {
    "Calibration": "mergekit_ot.settings",
    "PlanBundle": "mergekit_ot.bundle",
    "PlanSettings": "mergekit_ot.settings",
    "Recipe": "mergekit_ot.recipe",
    "TransportPlan": "mergekit_ot.plan",
    "load_bundle": "mergekit_ot.bundle",
    "load_recipe": "mergekit_ot.recipe",
    "merge_recipe": "mergekit_ot.pipeline",
    "plan_recipe": "mergekit_ot.pipeline",
    "register": "mergekit_ot.registration",
    "solve_plan": "mergekit_ot.solvers",
    "transport_weight": "mergekit_ot.transport",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mergekit_ot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
