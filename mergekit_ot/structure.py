"""What an architecture is made of, as data: widths, heads, norms and tensor names of decoder-only transformers.

Adding a family that keeps this block shape (pre-norm attention with grouped keys, then a gated MLP) is one row of
`FAMILIES`. Nothing is guessed from names or paths: the row is chosen by `config.model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PretrainedConfig


class UnsupportedModelError(ValueError):
    """This checkpoint cannot take part in a transport merge; the message names it, why, and what would do."""


@dataclass(frozen=True)
class Family:
    """One row of architecture facts.

    Args:
        rotary (`str`): name of the rotary embedding class in the family's modeling file.
        norm_offset (`float`): 1 when the norm multiplies by `1 + weight`, else 0.
        mlp_norm (`str`): norm that the MLP reads through.
        attention_post_norm, mlp_post_norm (`str`, *optional*): norms between a block's output and the stream.
        qk_norm (`bool`): whether queries and keys are normalised per head.
        scaled_embedding (`bool`): whether embeddings are multiplied by the square root of the width.
        activation_key (`str`): config key of the gate's activation.
    """

    rotary: str
    norm_offset: float = 0.0
    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    qk_norm: bool = False
    scaled_embedding: bool = False
    activation_key: str = "hidden_act"


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaRotaryEmbedding"),
    "mistral": Family("MistralRotaryEmbedding"),
    "qwen2": Family("Qwen2RotaryEmbedding"),
    "qwen3": Family("Qwen3RotaryEmbedding", qk_norm=True),
    "gemma3_text": Family(
        "Gemma3RotaryEmbedding",
        norm_offset=1.0,
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=True,
        scaled_embedding=True,
        activation_key="hidden_activation",
    ),
}
ATTENTION_NORM = "input_layernorm"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Structure:
    """The shape of one model.

    Args:
        name (`str`): path or hub id, for messages.
        model_type (`str`): key of `FAMILIES`.
        width, mlp_width, n_layers, n_heads, n_kv_heads, head_dim, vocab_size (`int`): sizes.
        activation (`str`): gate activation.
        attention_scale (`float`): factor on the attention scores.
        tied (`bool`): whether lm_head is the embedding.
        frequencies (`list[torch.Tensor]`): rotary inverse frequencies `(head_dim / 2,)` of every layer.
    """

    name: str
    model_type: str
    width: int
    mlp_width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    activation: str
    attention_scale: float
    tied: bool
    frequencies: list[torch.Tensor] = field(repr=False, compare=False)

    @property
    def family(self) -> Family:
        """The architecture row."""
        return FAMILIES[self.model_type]

    @property
    def embedding_scale(self) -> float:
        """Factor between an embedding row and the stream it starts."""
        return self.width**0.5 if self.family.scaled_embedding else 1.0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    def summary(self) -> dict:
        """Sizes as plain JSON, for reports and for comparing a bundle with the models at hand."""
        keys = ("model_type", "width", "mlp_width", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
        return {key: getattr(self, key) for key in keys} | {"tied": self.tied, "activation": self.activation}


def layer_tensor(layer: int, part: str) -> str:
    """Checkpoint name of a tensor of a layer, e.g. `layer_tensor(3, "self_attn.q_proj.weight")`."""
    return f"model.layers.{layer}.{part}"


def split_name(name: str) -> tuple[int, str] | None:
    """Layer index and part of a checkpoint tensor name, or `None` for tensors outside the layers."""
    pieces = name.split(".", 3)
    if len(pieces) == 4 and pieces[:2] == ["model", "layers"] and pieces[2].isdigit():
        return int(pieces[2]), pieces[3]
    return None


def read_structure(config: PretrainedConfig, name: str) -> Structure:
    """Read the shape of a model from its config.

    Args:
        config (`PretrainedConfig`): as loaded by `AutoConfig`.
        name (`str`): path or hub id, for messages.

    Raises:
        [`UnsupportedModelError`]: for an unknown architecture, a quantized checkpoint, or odd head counts.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name}: architecture {config.model_type!r} is not supported; supported are {sorted(FAMILIES)}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{name} is a quantized checkpoint; transport needs float weights. Use the original checkpoint, or "
            "dequantize it and save it again."
        )
    family = FAMILIES[config.model_type]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"{name}: {heads} heads over {kv_heads} key/value heads of size {head_dim} do not form whole groups of pairs."
        )
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim
    return Structure(
        name=name,
        model_type=config.model_type,
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        activation=str(getattr(config, family.activation_key)),
        attention_scale=float(scalar) ** -0.5,
        tied=bool(config.tie_word_embeddings),
        frequencies=_frequencies(config, family),
    )


def load_structure(model: str | Path, *, trust_remote_code: bool = False) -> Structure:
    """Read the shape of a model from a folder or hub id."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except ValueError as error:  # says it at length
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"{model} cannot be used: {reason}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # it computes with whatever is there
        raise UnsupportedModelError(
            f"transformers cannot make sense of the config.json of {model} ({type(error).__name__}: {error})."
        ) from error
    return read_structure(config, str(model))


def _frequencies(config: PretrainedConfig, family: Family) -> list[torch.Tensor]:
    """Rotary frequencies of every layer, from the family's own rotary module."""
    import importlib

    module_type = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{module_type}.modeling_{module_type}")
    try:
        rotary = getattr(module, family.rotary)(config)
    except Exception as error:  # transformers computes with whatever config.json holds
        raise UnsupportedModelError(
            f"No rotary embedding can be made of this {config.model_type} config's rope_parameters "
            f"{getattr(config, 'rope_parameters', None)!r} ({type(error).__name__}: {error}); is config.json damaged?"
        ) from error
    if hasattr(rotary, "inv_freq"):
        return [rotary.inv_freq.float().clone()] * config.num_hidden_layers
    return [getattr(rotary, f"{kind}_inv_freq").float().clone() for kind in config.layer_types]
