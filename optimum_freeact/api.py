"""The verbs on a model that is in memory: quantize it, save it."""

from __future__ import annotations

from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.quantizer import FreeActHfQuantizer
from optimum_freeact.modules.surgery import quantized_linears


def quantize(model: nn.Module, config: FreeActConfig) -> nn.Module:
    """Quantize a loaded full-precision model in place; for models that did not come through `from_pretrained`.

    Args:
        model: A transformers decoder model.
        config ([`FreeActConfig`]): Settings with `dataset`.

    Returns:
        The same model, with `save_pretrained` and `dequantize` as after `from_pretrained`.

    Raises:
        `ValueError`: for a model that is quantized already, and for all that [`FreeActConfig`] and calibration refuse.
    """
    present = getattr(model.config, "quantization_config", None)
    if present is not None or quantized_linears(model):
        raise ValueError(
            f"The model is quantized already ({type(present).__name__}): load it in full precision first."
        )
    quantizer = FreeActHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model
