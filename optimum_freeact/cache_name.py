"""The name of the KV cache among a forward's arguments: `past_key_values` until transformers 5.23, `cache` from 5.24 on.

Newer versions take the old name too, with a warning, but call their own modules by the new one; code that looks into the
arguments must know both.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


NAMES = ("cache", "past_key_values")


def cache_name(module: nn.Module) -> str | None:
    """What `module.forward` calls its KV cache; `None` if it takes none. A head that passes all on is asked for its decoder."""
    named = inspect.signature(module.forward).parameters
    for name in NAMES:
        if name in named:
            return name
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    return None if decoder is module else cache_name(decoder)


def cache_in(arguments: dict[str, Any]) -> Any:
    """The KV cache among a forward's keyword arguments, under either name; `None` if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
