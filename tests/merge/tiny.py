"""Tiny models of every supported family with uneven norms and biases, a small tokenizer, and texts."""

import functools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma3_text": Gemma3TextConfig,
}
FAMILIES = list(CONFIGS)
WORDS = "alpha beta gamma delta plan cost mass neuron layer head stream donor target merge width depth".split()


def texts(count: int = 60, seed: int = 0, length: int = 30) -> list[str]:
    """Reproducible sentences of a few words and numbers."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) + str(draw.randrange(30)) for _ in range(length)) for _ in range(count)]


@functools.cache
def tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts(200, seed=1), trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def build(family: str = "llama", seed: int = 0, tied: bool = True, **changes):
    """A tiny model whose norms, biases and attention are far from trivial."""
    sizes = SIZES | {"tie_word_embeddings": tied} | changes
    if family == "gemma3_text":
        sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "norm" in name:
            parameter.data = parameter.data + 0.3 * noise.clamp(-2, 2)
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5
    return model.eval()


def checkpoint(model) -> tuple:
    """Config and state dict, the form that `relatives` works on."""
    return model.config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def from_checkpoint(config, state):
    """A model with exactly these tensors."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def save(model, folder: Path, vocab_size: int = 300) -> Path:
    """Write an ordinary checkpoint folder with tokenizer."""
    model.save_pretrained(folder)
    tokenizer(vocab_size).save_pretrained(folder)
    return folder


def write_texts(path: Path, lines: list[str]) -> Path:
    """Write one text per line."""
    path.write_text("\n".join(lines) + "\n")
    return path
