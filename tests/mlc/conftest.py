"""A tiny model, a byte tokenizer with a chat template, and a parallel data set in made-up languages."""

import gc

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["cat", "boat", "apple", "stone", "cloud", "piano", "river", "bread", "train", "glove", "horse", "lamp"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", *(f"<|x{i}|>" for i in range(40))]}
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(tokenizer, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session", autouse=True)
def _frozen_heap():
    """Every training collects garbage once; what the imports left need not be walked a hundred times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> str:
    """Folder of a tiny causal language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tied(tmp_path_factory, tokenizer) -> str:
    """Folder of a tiny model whose head is its embedding."""
    folder, model = tmp_path_factory.mktemp("tied-llama"), tiny_llama(tokenizer)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def translate(text: str, language: str) -> str:
    """A made-up language: letters shifted by a fixed amount, other length."""
    shift = {"sw": 1, "bn": 5, "ar": 11}[language]
    moved = "".join(chr((ord(c) - 97 + shift) % 26 + 97) if c.isalpha() else c for c in text.lower())
    return moved + "." * shift


def rows(n: int = 12, conversational: bool = False, missing: int = 0) -> dict[str, list]:
    """Preference rows; every `missing`-th row lacks one translation, and one of those lacks all."""
    table: dict[str, list] = {"prompt": [], "chosen": [], "rejected": [], "prompt_translations": []}
    for i in range(n):
        text = f"say {WORDS[i % len(WORDS)]} {i}"
        translations = {language: translate(text, language) for language in ("sw", "bn", "ar")}
        if missing and i % missing == 0:
            translations["bn"] = None
            if i % (2 * missing) == 0:
                translations = dict.fromkeys(translations)
        table["prompt"].append([{"role": "user", "content": text}] if conversational else text)
        for name, answer in (("chosen", " yes"), ("rejected", " never")):
            table[name].append([{"role": "assistant", "content": answer}] if conversational else answer)
        table["prompt_translations"].append(translations)
    return table


@pytest.fixture
def preferences():
    from datasets import Dataset

    return lambda **kwargs: Dataset.from_dict(rows(**kwargs))


def run_options(folder) -> dict:
    """Arguments that every tiny run shares."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }


@pytest.fixture
def options(tmp_path):
    return run_options(tmp_path)
