"""Quantize a model that is in memory, make a quantized model run, and turn it back into a plain one."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import nn

from optimum_freeact.calibration.blockwise import calibrate, check_model
from optimum_freeact.calibration.data import load_samples
from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.quantizer import FreeActHfQuantizer, attach_state
from optimum_freeact.modules.layout import find_blocks, find_decoder, unquantized_parameters
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.surgery import input_name, quantized_linears
from optimum_freeact.token_types import TokenTyper, install_typer


logger = logging.getLogger(__name__)


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


def find_tokenizer(model: nn.Module, config: FreeActConfig) -> Any:
    """The config's tokenizer, or the one saved beside the model; `None` if there is none."""
    if config.tokenizer is not None and not isinstance(config.tokenizer, str):
        return config.tokenizer
    from transformers import AutoTokenizer

    name = config.tokenizer or getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        logger.warning("No tokenizer found at %r (%s); pass FreeActConfig(tokenizer=...).", name, error)
        return None


def run_calibration(model: nn.Module, config: FreeActConfig) -> list:
    """Calibrate and replace all blocks; the records go to `config.calibration_record`."""
    check_model(model, config)
    is_ids = isinstance(config.dataset, torch.Tensor)
    samples = load_samples(
        config.dataset,
        None if is_ids else find_tokenizer(model, config),
        config.n_samples,
        config.seq_len,
        config.seed,
        model.get_input_embeddings().num_embeddings,
    )
    prefix, blocks = find_blocks(model)
    linear = next(m for m in blocks.modules() if type(m) is nn.Linear)
    config.weight_dtype = str(linear.weight.dtype).removeprefix("torch.")
    if config.calibration_device is not None:
        device = torch.device(config.calibration_device)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, decoder = attach_state(model), find_decoder(model)
    handle = install_typer(decoder, TokenTyper(config.token_types), state)
    start = time.perf_counter()
    try:
        records = list(calibrate(model, config, samples, state, device))
    finally:
        handle.remove()
        state.types = None
    config.calibration_record = {
        "n_samples": len(samples),
        "seq_len": samples.shape[1],
        "seconds": round(time.perf_counter() - start, 2),
        "output_error": [round(record.output_error, 6) for record in records],
    }
    model.__dict__["_freeact_records"] = records
    kept = unquantized_parameters(model, prefix, find_blocks(model)[1])
    for name, reason in kept.items():
        logger.info("%s stays as it is: %s.", name, reason)
    experts = [name for name, reason in kept.items() if "experts" in reason]
    if experts:
        logger.warning(
            "%d mixture-of-experts tensors (%s, ...) are 3-D parameters and stay in full precision.",
            len(experts),
            experts[0],
        )
    return records


def activate(model: nn.Module, config: FreeActConfig) -> None:
    """Install the hooks that a quantized model needs to run: token types and KV cache."""
    for old in model.__dict__.pop("_freeact_hooks", []):
        old.remove()
    hooks = [install_typer(find_decoder(model), TokenTyper(config.token_types), attach_state(model))]
    if config.kv_bits < 16:
        from optimum_freeact.modules.kv_cache import CacheSpec, install_kv_cache

        sinks = 1 if "sink" in config.token_types else 0
        hooks.append(install_kv_cache(model, CacheSpec(bits=config.kv_bits, rotate=True, sink_tokens=sinks)))
    model.__dict__["_freeact_hooks"] = hooks
    for module in quantized_linears(model).values():
        module.prepare()


def dequantize_(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Replace quantized linears by plain ones in `dtype`, in place: exact up to what rounding has lost.

    Activations and the cache are no longer rounded; with several token types the bias is that of ordinary text.
    """
    dtype = dtype or torch.float32
    inputs = set()
    for name, module in quantized_linears(model).items():
        weight, bias = module.dequantized()
        plain = nn.Linear(module.in_features, module.out_features, bias is not None, device=weight.device, dtype=dtype)
        plain.weight.data.copy_(weight)
        if bias is not None:
            plain.bias.data.copy_(bias)
        model.set_submodule(name, plain)
        inputs.add(name)
    for name in inputs:
        parent, _, leaf = input_name([name]).rpartition(".")
        model.get_submodule(parent)._modules.pop(leaf, None)
    for hook in model.__dict__.pop("_freeact_hooks", []):
        hook.remove()
    return model


__all__ = ["FreeActLinear", "activate", "dequantize_", "quantize", "run_calibration"]
