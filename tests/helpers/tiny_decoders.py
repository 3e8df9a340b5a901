"""Random decoders of a few thousand weights, one per family, big enough to tell prompts apart."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


VOCABULARY = 61
FAMILIES = ("llama", "qwen2", "mistral", "gemma3")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def tiny_decoder(family: str, key_value_heads: int = 2, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """`family` is llama, qwen2 (biases on q, k, v), mistral (window 6 everywhere) or gemma3 (window 6 in one of two)."""
    sizes = {**_SIZES, "num_key_value_heads": key_value_heads}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=6))
    elif family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=6, layer_types=layers))
    else:
        raise ValueError(f"no tiny decoder of family {family!r}; use llama, qwen2, mistral or gemma3.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif name.endswith("o_proj.weight"):  # the next token depends on all before, not on the last alone
                parameter *= 5
    return model.eval().to(dtype)


def prompt(batch: int = 2, tokens: int = 11) -> torch.Tensor:
    """Random ids without padding."""
    return torch.randint(1, VOCABULARY, (batch, tokens))
