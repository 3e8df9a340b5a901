"""Which of transformers' automatic classes makes the language model of a config."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig


NAMES = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM")


def auto_class(config: PretrainedConfig) -> Any:
    """The first class that knows the config.

    Raises:
        `ValueError`: for the config of no language model.
    """
    if getattr(config, "auto_map", None):  # remote code says itself
        return AutoModelForCausalLM
    for name in NAMES:
        found = getattr(transformers, name, None)
        if found is not None and type(config) in found._model_mapping:
            return found
    raise ValueError(f"model_type={config.model_type!r} is that of no language model which transformers knows.")
