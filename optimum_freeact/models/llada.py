"""LLaDA (2502.09992) on transformers' Llama: the same layers without a causal mask, loaded from its checkpoints.

    import optimum_freeact.models.llada
    model = AutoModelForMaskedLM.from_pretrained("GSAI-ML/LLaDA-8B-Instruct")

LLaDA's own code does not run on transformers 5; nothing of it is executed here (no `trust_remote_code`).
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from optimum_freeact.models.bidirectional import Bidirectional, understand_remote_fields


# LLaDA's name of a setting -> Llama's
FIELDS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
    "include_qkv_bias": "attention_bias",
}
# LLaDA's name of a tensor -> Llama's
NAMES = (
    (r"^model\.transformer\.wte", "model.embed_tokens"),
    (r"^model\.transformer\.ln_f", "model.norm"),
    (r"^model\.transformer\.ff_out", "lm_head"),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_norm", r"model.layers.\1.input_layernorm"),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"^model\.transformer\.blocks\.(\d+)\.q_proj", r"model.layers.\1.self_attn.q_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.k_proj", r"model.layers.\1.self_attn.k_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.v_proj", r"model.layers.\1.self_attn.v_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_out", r"model.layers.\1.self_attn.o_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_proj", r"model.layers.\1.mlp.gate_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.up_proj", r"model.layers.\1.mlp.up_proj"),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_out", r"model.layers.\1.mlp.down_proj"),
)


class LladaConfig(LlamaConfig):
    """A Llama configuration that also understands LLaDA's names.

    Args:
        mask_token_id (`int`, *optional*): Id of [MASK].
        shifted_logits (`bool`, *optional*, defaults to `False`): Logits at position i are those of token i + 1, as in a
            model adapted from an autoregressive one.
    """

    model_type = "llada"
    mask_token_id: int | None = None
    shifted_logits: bool = False

    def __post_init__(self, **kwargs):
        for theirs, ours in FIELDS.items():
            value = kwargs.pop(theirs, None)
            if value is not None:
                setattr(self, ours, value)
        understand_remote_fields(self, kwargs)
        super().__post_init__(**kwargs)


class LladaModel(Bidirectional, LlamaModel):
    """The decoder; see [`Bidirectional`]."""

    config_class = LladaConfig


class LladaForMaskedLM(LlamaForCausalLM):
    """[`LladaModel`] with its head: the logits at a masked position are those of the token that belongs there."""

    config_class = LladaConfig

    def __init__(self, config: LladaConfig):
        super().__init__(config)
        self.model = LladaModel(config)
        self.post_init()


AutoConfig.register("llada", LladaConfig, exist_ok=True)
AutoModel.register(LladaConfig, LladaModel, exist_ok=True)
AutoModelForCausalLM.register(LladaConfig, LladaForMaskedLM, exist_ok=True)
AutoModelForMaskedLM.register(LladaConfig, LladaForMaskedLM, exist_ok=True)
register_checkpoint_conversion_mapping("llada", [WeightRenaming(*pair) for pair in NAMES], overwrite=True)
