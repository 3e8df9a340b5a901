"""Calibrated 4-bit weights, activations and KV cache for transformers.

    import optimum_freeact
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=FreeActConfig(dataset="texts.txt"))

Importing this package makes transformers know `quant_method` "freeact"; that is its only side effect.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf import registration as _registration  # noqa: F401
from optimum_freeact.hf.quantizer import FreeActHfQuantizer
from optimum_freeact.version import VERSION as _VERSION


__version__ = _VERSION

if TYPE_CHECKING:  # for type checkers and editors; names are imported on first use
    from optimum_freeact.api import quantize as quantize
    from optimum_freeact.api import save as save
    from optimum_freeact.modules.activation import FreeActInput as FreeActInput
    from optimum_freeact.modules.linear import FreeActLinear as FreeActLinear
    from optimum_freeact.report.evaluate import score_text as score_text
    from optimum_freeact.report.evaluate import tokenize_windows as tokenize_windows
    from optimum_freeact.token_types import TokenTyper as TokenTyper
    from optimum_freeact.type_state import given_types as given_types

# imported on first use, so that importing the package stays cheap
_LAZY = {
    "FreeActInput": "optimum_freeact.modules.activation",
    "FreeActLinear": "optimum_freeact.modules.linear",
    "TokenTyper": "optimum_freeact.token_types",
    "given_types": "optimum_freeact.type_state",
    "quantize": "optimum_freeact.api",
    "save": "optimum_freeact.api",
    "score_text": "optimum_freeact.report.evaluate",
    "tokenize_windows": "optimum_freeact.report.evaluate",
}

__all__ = [
    "FreeActConfig",
    "FreeActHfQuantizer",
    "FreeActInput",
    "FreeActLinear",
    "TokenTyper",
    "given_types",
    "quantize",
    "save",
    "score_text",
    "tokenize_windows",
]


if not TYPE_CHECKING:  # a checker would believe that every name exists

    def __getattr__(name: str):
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
