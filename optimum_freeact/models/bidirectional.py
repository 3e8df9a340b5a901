"""Decoders without a causal mask: what makes a diffusion language model of a class that transformers has."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from optimum_freeact.cache_name import NAMES


def full_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, past: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Additive mask `(batch, 1, length, past + length)` by which every token sees every real token.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*): 1 for real tokens.
    """
    mask = torch.zeros(batch, 1, length, past + length, dtype=dtype, device=device)
    if attention_mask is None:
        return mask
    return mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(dtype).min)


def understand_remote_fields(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """Take from the `fields` of a configuration that was written for remote code what transformers calls otherwise."""
    if fields.get("rope_theta") is not None and config.rope_parameters is None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields.pop("auto_map", None)  # remote code that is not needed


if TYPE_CHECKING:
    from transformers import PreTrainedModel as Host  # a type checker sees the kind of class that this is put before
else:
    Host = object


class Bidirectional(Host):
    """Put before a transformers decoder class: every token attends to every other, cached ones included.

    A 4-D mask of the caller's (blocks that see only what lies before them, say) is used as it is.
    """

    _host_cache: str

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(Bidirectional) + 1 :]
        host: Any = next(base for base in behind if "forward" in vars(base))
        cls._host_cache = next(name for name in NAMES if name in inspect.signature(host.forward).parameters)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """As the decoder's own forward; the cache goes by its old name, too."""
        cache = past_key_values if cache is None else cache
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None and (attention_mask is None or attention_mask.ndim == 2):
            past = 0 if cache is None else cache.get_seq_length()
            dtype = self.embed_tokens.weight.dtype if inputs_embeds is None else inputs_embeds.dtype
            attention_mask = full_mask(attention_mask, tokens.shape[0], tokens.shape[1], past, dtype, tokens.device)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),  # a denoising pass caches nothing unless it is told to
            **{self._host_cache: cache},
            **kwargs,
        )
