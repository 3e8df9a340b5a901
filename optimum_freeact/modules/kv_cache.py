"""Give a model a quantized KV cache, through a forward pre-hook and transformers' own cache layers.

The hook stands on the decoder (the module that owns the layers) and acts before each forward:

* an *empty* `DynamicCache`, made by `generate` or by the user, gets our layers in place of `DynamicLayer` and
  `DynamicSlidingWindowLayer`; other layers (recurrent states, shared ones, sparse-attention indexers) stay;
* where a cache is wanted and none is given, it makes one;
* static, already filled, encoder-decoder and transformers' own quantized caches are left alone, with one warning;
* from the attention mask it tells our layers where each row's first real token is.

A forward with `use_cache=False` and no cache has unquantized keys and values.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from optimum_freeact.cache_name import NAMES, cache_in, cache_name
from optimum_freeact.modules.kv_layer import FreeActCacheLayer, FreeActSlidingWindowLayer
from optimum_freeact.modules.kv_store import PER_LAYER, CacheSpec


logger = logging.getLogger(__name__)


def convert_cache(cache: DynamicCache, spec: CacheSpec, num_layers: int) -> bool:
    """Replace the plain layers of an empty cache by quantized ones. Modifies `cache`.

    Args:
        cache (`DynamicCache`): Left alone if any layer holds tokens.
        spec ([`CacheSpec`]): 4 or 8 bits.
        num_layers (`int`): Of the decoder; a cache that makes its layers lazily gets this many at once.

    Returns:
        `bool`: whether the cache has quantized layers now.
    """
    layers = cache.layers
    if not layers and cache.layer_class_to_replicate is DynamicLayer:
        layers = [DynamicLayer() for _ in range(num_layers)]
    attention = [layer for layer in layers if isinstance(layer, DynamicLayer)]
    if not any(layer.get_seq_length() for layer in attention):
        cache.layers = [_convert_layer(layer, spec, index) for index, layer in enumerate(layers)]
    return any(isinstance(layer, FreeActCacheLayer) for layer in cache.layers)


def _convert_layer(layer, spec: CacheSpec, index: int):
    if type(layer) is DynamicLayer:
        return FreeActCacheLayer(spec, index)
    if type(layer) is DynamicSlidingWindowLayer:
        converted = FreeActSlidingWindowLayer(spec, index, sliding_window=layer.sliding_window)
        converted.record_past = layer.record_past
        return converted
    return layer


def row_starts(attention_mask, batch: int, length: int) -> torch.Tensor | None:
    """Position of each row's first real token.

    Args:
        attention_mask: What a decoder may be given: `None`, a `torch.Tensor` of shape `(batch, length)` with 1 for
            real tokens, one of shape `(batch, 1, queries, length)` (boolean, or additive with 0 for visible), or a
            dictionary of those by layer type, of which `"full_attention"` is read.
        batch (`int`): Number of rows.
        length (`int`): Tokens cached before plus tokens of this call.

    Returns:
        `torch.Tensor` (int64, on the CPU) of shape `(batch,)`, `length` for a row of padding only; zeros if there is
        no mask; `None` if the mask is of another kind or does not cover the whole text.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape[-1] != length:
        return None
    if attention_mask.dim() == 2:
        real = attention_mask != 0
    elif attention_mask.dim() == 4:
        last = attention_mask[:, 0, -1]  # the last query sees every real token
        real = last if last.dtype == torch.bool else last == 0
    else:
        return None
    real = real.expand(batch, length).cpu()
    return torch.where(real.any(-1), real.int().argmax(-1), length)


class _CacheHook:
    """The pre-hook; an object, so that it is found again and copied with its module."""

    def __init__(self, spec: CacheSpec):
        self.spec = spec
        self.warned = False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:  # from here on by name
            kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return (), kwargs  # the decoder's own error says more
        cache = cache_in(kwargs)
        if cache is not None:
            self._quantize(cache, module, kwargs.get("attention_mask"), inputs)
        elif _wants_cache(module, kwargs):
            kwargs[cache_name(module)] = self._quantize(None, module, kwargs.get("attention_mask"), inputs)
        return (), kwargs

    @torch.compiler.disable  # it looks at the mask's numbers
    def _quantize(self, cache, module: nn.Module, attention_mask, inputs: torch.Tensor):
        """The cache given, or a new one, with quantized layers where it can have them."""
        cache = DynamicCache(config=module.config) if cache is None else cache
        if isinstance(cache, DynamicCache) and convert_cache(cache, self.spec, module.config.num_hidden_layers):
            _set_starts(cache, attention_mask, *inputs.shape[:2])
        elif not self.warned:
            self.warned = True
            logger.warning(
                "kv_bits=%d: this %s is left as it is, and keys and values in it are not quantized. Only an empty "
                "DynamicCache becomes a quantized one: leave cache_implementation and the cache argument out.",
                self.spec.bits,
                type(cache).__name__,
            )
        return cache


def _wants_cache(module: nn.Module, kwargs: dict) -> bool:
    """Whether the decoder would make a cache: `use_cache`, else the configuration's; never when checkpointing."""
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(module.config, "use_cache", False) if use_cache is None else use_cache
    checkpoints = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
    return bool(use_cache) and not checkpoints


def _set_starts(cache: DynamicCache, attention_mask, batch: int, length: int) -> None:
    layers = [layer for layer in cache.layers if isinstance(layer, FreeActCacheLayer)]
    if layers[0].awaits_start:  # decoding: every row's first token was seen, the mask need not be read
        starts = row_starts(attention_mask, batch, layers[0].get_seq_length() + length)
        for layer in layers if starts is not None else ():
            layer.set_start(starts)


@dataclass(frozen=True, eq=False)
class KVCacheHandle:
    """What [`install_kv_cache`] did: `decoder` carries the hook (unless `spec.bits` is 16); `remove()` takes it off."""

    decoder: nn.Module
    spec: CacheSpec

    def remove(self) -> None:
        """Take the hook off. Caches that were made meanwhile stay quantized and usable."""
        for key, hook in list(self.decoder._forward_pre_hooks.items()):
            if isinstance(hook, _CacheHook):
                del self.decoder._forward_pre_hooks[key]
                self.decoder._forward_pre_hooks_with_kwargs.pop(key, None)


def install_kv_cache(model: nn.Module, spec: CacheSpec) -> KVCacheHandle:
    """Make every dynamic cache that `model` fills from now on a quantized one.

    Works with `generate` (greedy, sampling, beams, assisted, chunked prefill), plain forwards, left padding, and copies
    of the model. Installing again replaces what was installed. With 16 bits nothing stays installed.

    Args:
        model (`PreTrainedModel`): A decoder-only model, with or without head.
        spec ([`CacheSpec`]): Bits and options.

    Returns:
        [`KVCacheHandle`]

    Raises:
        `ValueError`: if the model is no decoder with a KV cache, or an encoder-decoder model, or `spec`
            does not have one entry per layer.

    Example:
    ```python
    >>> handle = install_kv_cache(model, CacheSpec(bits=4, rotate=True))
    >>> model.generate(**inputs)
    >>> handle.remove()
    ```
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model; a quantized KV cache needs a decoder-only one: bits=16."
        )
    if cache_name(decoder) is None:
        raise ValueError(
            f"{type(decoder).__name__} of {name} takes neither {' nor '.join(NAMES)}, so it has no KV cache to quantize; use bits=16."
        )
    layers = decoder.config.num_hidden_layers
    for field in PER_LAYER:
        entries = getattr(spec, field)
        if entries is not None and len(entries) != layers:
            raise ValueError(f"{field} has {len(entries)} entries, {name} has {layers} layers; pass one per layer.")
    handle = KVCacheHandle(decoder, spec)
    handle.remove()
    if spec.bits != 16:
        decoder.register_forward_pre_hook(_CacheHook(spec), with_kwargs=True)
    return handle
