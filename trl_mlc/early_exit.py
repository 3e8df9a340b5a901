"""Run a decoder only as deep as one layer needs: no later layers, no head, no logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from trl_mlc.buckets import OVERHEAD, length_buckets
from trl_mlc.pooling import POOLINGS


LAYER_LISTS = ("layers", "h", "blocks")  # names under which decoders keep their layers


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a causal or sequence-classification model, also inside a vision-language wrapper.

    Raises:
        `ValueError`: for encoder-decoder models and for decoders whose list of layers is not found.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; the prompt representation is defined for decoder-only "
            "models. Use a causal language model."
        )
    decoder = model.get_decoder()
    _layer_list_name(decoder)
    return decoder


def n_layers(decoder: nn.Module) -> int:
    """Number of decoder layers."""
    return len(getattr(decoder, _layer_list_name(decoder)))


def check_layer(layer: int, decoder: nn.Module) -> int:
    """Return `layer` as a non-negative index into `hidden_states`, counting negative ones from the end.

    Raises:
        `ValueError`: outside `[-L-1, L]`.
    """
    last = n_layers(decoder)
    if not -last - 1 <= layer <= last:
        raise ValueError(
            f"mlc_layer={layer} is outside the hidden states of this model: use 0 (embeddings) to {last} (after the "
            f"final norm), or -1 to {-last - 1} from the end."
        )
    return layer if layer >= 0 else last + 1 + layer


def hidden_state_at(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer: int,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exactly `decoder(..., output_hidden_states=True).hidden_states[layer]`, without running what comes after.

    Hidden state 0 is the embedding, `l` the output of layer `l` before any later norm, and the last one (`L`) the
    decoder's normed output. The list of layers is shortened for the call, so masks, rotary tables and sliding windows
    are the decoder's own.

    Args:
        decoder (`nn.Module`): from [`decoder_of`].
        input_ids (`torch.LongTensor` of shape `(B, T)`).
        attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*).
        layer (`int`): in `[0, L]`.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): the decoder's own, if not given.

    Returns:
        `torch.Tensor` of shape `(B, T, d)` in the model's dtype.
    """
    total = n_layers(decoder)
    call = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        call["position_ids"] = position_ids
    if layer == total:
        return decoder(**call).last_hidden_state
    captured: list[torch.Tensor] = []
    with _first_layers(decoder, max(layer, 1)) as layers, _captured(layers, layer, captured):
        decoder(**call)
    return captured[0]


def encode_prompts(
    decoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    layer: int,
    pooling: str = "last",
    buckets: int = 1,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Pooled hidden states of right-padded prompts, in length buckets so that short ones don't pay for long ones.

    Args:
        decoder (`nn.Module`): from [`decoder_of`].
        input_ids (`torch.LongTensor` of shape `(P, T)`): right padded.
        attention_mask (`torch.LongTensor` of shape `(P, T)`).
        layer (`int`): see [`hidden_state_at`].
        pooling (`str`, *optional*, defaults to `"last"`): `"last"` or `"mean"`.
        buckets (`int`, *optional*, defaults to 1): at most this many forwards, of prompts of similar length
            ([`~trl_mlc.buckets.length_buckets`]).
        lengths (`Sequence[int]`, *optional*): tokens of each prompt, if they are known without asking the device.

    Returns:
        `torch.Tensor` of shape `(P, d)`, in the order of the input.
    """
    pool = POOLINGS[pooling]
    if buckets <= 1 or input_ids.shape[0] <= 1:
        return pool(hidden_state_at(decoder, input_ids, attention_mask, layer), attention_mask)
    lengths = attention_mask.sum(1).tolist() if lengths is None else lengths
    parts, order = [], []
    for chosen in length_buckets(lengths, buckets, OVERHEAD.get(input_ids.device.type, 0)):
        rows, width = torch.tensor(chosen, device=input_ids.device), lengths[chosen[-1]]
        ids, mask = input_ids[rows, :width], attention_mask[rows, :width]
        parts.append(pool(hidden_state_at(decoder, ids, mask, layer), mask))
        order += chosen
    back = torch.tensor(order, device=input_ids.device).argsort()
    return torch.cat(parts)[back]


def _layer_list_name(decoder: nn.Module) -> str:
    for name in LAYER_LISTS:
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return name
    raise ValueError(
        f"{type(decoder).__name__} has no list of layers named one of {LAYER_LISTS}, so it cannot be stopped early."
    )


@contextmanager
def _first_layers(decoder: nn.Module, count: int):
    """Let the decoder see only its first layers; the layers themselves are untouched."""
    name = _layer_list_name(decoder)
    whole = getattr(decoder, name)
    setattr(decoder, name, nn.ModuleList(list(whole)[:count]))
    try:
        yield list(whole)[:count]
    finally:
        setattr(decoder, name, whole)


@contextmanager
def _captured(layers: list[nn.Module], layer: int, into: list[torch.Tensor]):
    """Keep what enters the first layer (`layer` 0) or leaves the last one; only once, recomputation may call again."""

    def entering(_module, args, kwargs):
        into.append(args[0] if args else kwargs["hidden_states"])

    def leaving(_module, _args, output):
        into.append(output[0] if isinstance(output, tuple) else output)

    if layer == 0:
        handle = layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    else:
        handle = layers[-1].register_forward_hook(leaving)
    try:
        yield
    finally:
        handle.remove()
