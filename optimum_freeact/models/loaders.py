"""Which module of this package makes transformers know a kind of model that it does not know by itself."""

from __future__ import annotations


# model_type of a config -> module to import
LOADERS = {"llada": "optimum_freeact.models.llada", "Dream": "optimum_freeact.models.dream"}


def loader_of(model_type: str | None) -> str | None:
    """The module, or `None` where transformers needs none."""
    return LOADERS.get(model_type or "")
