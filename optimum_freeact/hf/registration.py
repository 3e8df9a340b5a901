"""Makes transformers know `quant_method` "freeact". Importing this file is the package's only side effect."""

from __future__ import annotations

from transformers.quantizers import auto

from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.quantizer import FreeActHfQuantizer


NAME = "freeact"


def register() -> None:
    """Register config and quantizer once; a reload of this package replaces its own entries and nobody else's.

    Raises:
        `ValueError`: if another package holds the name.
    """
    for table, cls in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, FreeActConfig),
        (auto.AUTO_QUANTIZER_MAPPING, FreeActHfQuantizer),
    ):
        present = table.get(NAME)
        if present is not None and present.__module__ != cls.__module__:
            raise ValueError(f"quant_method {NAME!r} is registered by {present.__module__} already.")
        table[NAME] = cls
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (
        *(t for t in types if t.__module__ != FreeActConfig.__module__),
        FreeActConfig,
    )


register()
