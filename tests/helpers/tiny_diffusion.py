"""Tiny random masked-diffusion language models."""

from optimum_freeact.models.dream import DreamConfig, DreamForMaskedLM
from optimum_freeact.models.llada import LladaConfig, LladaForMaskedLM
from tests.helpers.tiny_models import VOCAB_SIZE, randomize_


MASK = VOCAB_SIZE - 1
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "mask_token_id": MASK,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {"llada": (LladaConfig, LladaForMaskedLM), "dream": (DreamConfig, DreamForMaskedLM)}


def make(kind="llada", **changes):
    """One of [`KINDS`]; `changes` go to its config."""
    config_class, model_class = KINDS[kind]
    model = model_class._from_config(config_class(**{**SIZES, **changes}), attn_implementation="eager").eval()
    randomize_(model)
    return model
