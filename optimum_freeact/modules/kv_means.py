"""Means of keys and values for a quantized cache, from one pass over a text.

Keys are cached after the rotary embedding, which turns their mean with the position. Turning each cached key back by
its own angle gives the mean before the embedding, whatever stands between projection and embedding (biases, norms).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from optimum_freeact.cache_name import NAMES, cache_name
from optimum_freeact.moments import loudness_weights


class CacheMeans(NamedTuple):
    """Per layer, as `CacheSpec` takes them (`CacheSpec(**means._asdict())`); all `None` for a layer without a cache."""

    key_mean: list[torch.Tensor | None]
    key_frequencies: list[torch.Tensor | None]
    value_mean: list[torch.Tensor | None]


def rotary_frequencies(decoder: nn.Module) -> list[torch.Tensor | None]:
    """Rotary frequencies of each layer, `(n,)` float64 on the CPU; `None` where the model does not say.

    Read from `decoder.rotary_emb`: one buffer for all layers, or one per layer type (Gemma 3).
    """
    rotary, config = getattr(decoder, "rotary_emb", None), decoder.config
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    found = [getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None)) for kind in types]
    return [None if f is None else f.detach().to("cpu", torch.float64) for f in found]


def turn_back(keys: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Undo the rotary embedding of keys at positions 0, 1, ...

    Args:
        keys (`torch.Tensor` of shape `(..., tokens, head_dim)`): The first `2 n` channels of each head are turned, channel
            `i` with channel `n + i` (the half-split form of Llama, Qwen, Mistral, Gemma, Phi-3 and OLMo-2).
        frequencies (`torch.Tensor` of shape `(n,)`): Angle per position.

    Returns:
        `torch.Tensor` of the shape of `keys`, float64.
    """
    angles = torch.arange(keys.shape[-2], device=keys.device).double()[:, None] * frequencies.to(keys.device)
    n = frequencies.numel()
    first, second, rest = keys.double().split((n, n, keys.shape[-1] - 2 * n), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def _weights(states: torch.Tensor, real: torch.Tensor, limit: float | None) -> torch.Tensor:
    """How much each cached vector counts, float64: `states` of shape `(batch, heads, tokens, d)`, `real` `(batch, tokens)`."""
    real = real.to(states.device)
    weights = real[:, None].expand(states.shape[:3]).double().clone()
    for head in range(states.shape[1]) if limit is not None else ():
        weights[:, head][real] = loudness_weights(states[:, head][real], limit).double()
    return weights


@torch.no_grad()
def cache_means(
    model: nn.Module, samples: torch.Tensor | list[dict], sink_tokens: int = 1, limit: float | None = None
) -> CacheMeans:
    """Measure the means of a decoder's keys (before the rotary embedding) and values.

    Args:
        model (`PreTrainedModel`): A decoder-only model, with or without head, without a quantized cache installed.
        samples (`torch.Tensor` of shape `(n, tokens)`, or `list[dict]`): Token ids without padding, run one row at a time; or
            the model's arguments, one dictionary a forward.
        sink_tokens (`int`, *optional*, defaults to 1): Positions left out of the means, as the cache keeps them exact.
        limit (`float`, *optional*): Beyond so many times what is usual in its head and sample a vector's energy counts no more
            (`moments.loudness_weights`). Padding, where an `attention_mask` tells it, never counts.

    Returns:
        [`CacheMeans`] with means in float32 on the CPU.

    Raises:
        `ValueError`: if `samples` has no token beyond the sink, or a quantized cache is installed.
    """
    if isinstance(samples, torch.Tensor):
        if samples.dim() != 2 or samples.shape[0] == 0 or samples.shape[1] <= sink_tokens:
            raise ValueError(
                f"the means of a KV cache need samples of shape (n, tokens) with more than {sink_tokens} tokens each, "
                f"got {tuple(samples.shape)}."
            )
        calls = [{"input_ids": row[None]} for row in samples]
    else:
        calls = samples
    decoder = model.get_decoder()
    frequencies = rotary_frequencies(decoder)
    sums: list[list[torch.Tensor] | None] = [None] * len(frequencies)
    for inputs in calls:
        cache = DynamicCache()  # without a configuration: no windows, all positions stay
        inputs = {name: v.to(decoder.device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        called = decoder if set(inputs) == {"input_ids"} else model
        called(**inputs, **{cache_name(called) or NAMES[0]: cache}, use_cache=True)
        real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        mask = inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == real.shape:
            real = mask.bool()
        real = real & (real.cumsum(1) > sink_tokens)
        for index, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                continue
            if not layer.keys.is_floating_point():
                raise ValueError(
                    f"{type(model).__name__} has a quantized KV cache installed; remove() its handle first."
                )
            keys = layer.keys if frequencies[index] is None else turn_back(layer.keys, frequencies[index])
            found = []
            for states in (keys, layer.values):
                weights = _weights(states, real, limit)[..., None]
                found += [(states.double() * weights).sum((0, 2)).cpu(), weights.sum((0, 2)).cpu()]
            before = sums[index]
            sums[index] = found if before is None else [a + b for a, b in zip(before, found)]
    means = [
        (None, None) if four is None else ((four[0] / four[1]).float(), (four[2] / four[3]).float()) for four in sums
    ]
    keys, values = zip(*means)
    known = [f if key is not None else None for f, key in zip(frequencies, keys)]
    return CacheMeans(list(keys), known, list(values))
