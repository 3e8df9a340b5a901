"""Make `merge_method: transport` known to mergekit, through its public registry only."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from mergekit_ot.method import TransportMerge


def register() -> TransportMerge:
    """Register the method once; further calls return the registered one.

    Raises:
        `RuntimeError`: when another package has taken the name.
    """
    from mergekit.merge_methods import register as register_method
    from mergekit.merge_methods import registered_methods

    from mergekit_ot.method import METHOD, TransportMerge

    for method in registered_methods():
        if method.spec.name == METHOD:
            if not isinstance(method, TransportMerge):
                raise RuntimeError(f"mergekit already has a method named {METHOD!r}: {type(method).__module__}.")
            return method
    method = TransportMerge()
    register_method(method)
    return method
