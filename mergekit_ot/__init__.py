"""Optimal-transport merging across architectures for mergekit.

`register()` makes `merge_method: transport` known to mergekit; `mergekit-ot run recipe.yml out/` does the rest.
Names are imported on first use, so that importing this package loads neither torch nor mergekit.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # for type checkers and editors; names are imported on first use
    from mergekit_ot.bundle import PlanBundle as PlanBundle
    from mergekit_ot.bundle import load_bundle as load_bundle
    from mergekit_ot.pipeline import merge_recipe as merge_recipe
    from mergekit_ot.pipeline import plan_recipe as plan_recipe
    from mergekit_ot.plan import TransportPlan as TransportPlan
    from mergekit_ot.recipe import Recipe as Recipe
    from mergekit_ot.recipe import load_recipe as load_recipe
    from mergekit_ot.registration import register as register
    from mergekit_ot.settings import Calibration as Calibration
    from mergekit_ot.settings import PlanSettings as PlanSettings
    from mergekit_ot.solvers import solve_plan as solve_plan
    from mergekit_ot.transport import transport_weight as transport_weight

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


if not TYPE_CHECKING:  # a checker would believe that every name exists

    def __getattr__(name: str):
        if name in _EXPORTS:
            return getattr(import_module(_EXPORTS[name]), name)
        raise AttributeError(f"module 'mergekit_ot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
