"""Tiny random models of real families, and a tokenizer to go with them: built in memory, seeded, no download.

`tiny("llama")` gives two decoder layers of width 64 with weights scaled as randn / sqrt(fan_in), so that every layer
matters to the output (transformers' own init of 0.02 makes small models almost constant, which hides errors).
`FAMILIES` is the table; a test that should hold for "any decoder" is parametrised over `DECODERS`.

Two ways to make a model hard to quantize, as trained ones are: `plant_outliers` (a few loud input channels whose
weights are quiet: the function stays what it was) and `plant_sink` (one token with massive activations).
"""

from collections.abc import Iterable, Sequence

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from torch import nn


PAD, BOS, EOS, UNK, IM_START, IM_END = range(6)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCAB_SIZE = 104  # 6 special tokens, 96 characters, 2 ids the tokenizer never gives

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, POSITIONS = 64, 96, 2, 4, 2, 256

_COMMON = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
_LOCAL_THEN_GLOBAL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

# family: (config class, model class, config fields on top of _COMMON)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SIZES, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SIZES, "head_dim": 32}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_SIZES, **_LOCAL_THEN_GLOBAL, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_SIZES, **_LOCAL_THEN_GLOBAL, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _SIZES),
    # Built of nn.Linear, but not in any table of ours: the generic fallback must serve them.
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "new_decoder_architecture": True,
        },
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _SIZES),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
    ),
    # Conv1D instead of nn.Linear: nothing here but the head is an nn.Linear.
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INTERMEDIATE, "n_positions": POSITIONS},
    ),
    # Experts are 3-D parameters in transformers 5.
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_SIZES, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_SIZES, **_EXPERTS, "num_local_experts": 4}),
    # An encoder: bidirectional, token types, a masked-language-model head.
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    ),
}

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2")
FALLBACK = ("gpt_neox", "falcon", "stablelm", "opt")
DECODERS = KNOWN + FALLBACK
EXPERTS = ("qwen3_moe", "mixtral")


def tiny(family: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A small random model of `family` in float32 and eval mode; the same seed gives the same weights.

    `overrides` go to the config (`attention_bias=True`, `tie_word_embeddings=True`, `hidden_size=32`, ...). The
    global random state is left as it was. Attention is `eager` unless `attn_implementation` says otherwise.
    """
    if family not in FAMILIES:
        raise KeyError(f"Unknown family {family!r}; known: {sorted(FAMILIES)}.")
    config_class, model_class, fields = FAMILIES[family]
    attention = overrides.pop("attn_implementation", "eager")
    config = getattr(transformers, config_class)(**{**_COMMON, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention)
    randomize_(model, seed)
    return model.float().eval()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Overwrite all parameters: matrices randn / sqrt(fan_in), norms around their start, biases of 0.1. In place."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():  # a tied weight comes once
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        elif id(parameter) in embeddings - heads:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def plant_outliers(
    model: transformers.PreTrainedModel, factor: float = 30.0, channels: Sequence[int] = (3, 17)
) -> list[str]:
    """Make a few input channels of the linears behind a norm `factor` times louder and their weights as much quieter.

    The model computes what it did before (to rounding), but its activations now have the outlier channels that make
    4-bit activations hard. Which linears read which norm is seen in one forward pass, and a norm that others read too
    is left alone, so any architecture works. Changes the model and returns the names of the linears concerned.

    Raises:
        ValueError: when no norm feeds linears only (OLMo-2 and BERT: their linears read the residual stream).
    """
    ids = sample_ids(2, 12)
    before = model(input_ids=ids).logits
    touched = []
    for norm, linears in _norm_readers(model, ids):
        _scale(norm, linears.values(), factor, channels)
        if torch.allclose(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-3):
            touched += linears
        else:  # something that is no linear reads this norm too
            _scale(norm, linears.values(), 1 / factor, channels)
    if not touched:
        raise ValueError(f"No norm of {type(model).__name__} feeds linears only: outliers cannot be planted in it.")
    return touched


@torch.no_grad()
def plant_sink(
    model: transformers.PreTrainedModel, token_id: int = BOS, factor: float = 100.0, channel: int = 5
) -> None:
    """Give one token (by default BOS) a massive activation: one embedding channel `factor` times the row's norm.

    It travels along the residual stream through all blocks, as the attention sink of a trained model does.
    """
    row = model.get_input_embeddings().weight[token_id]
    row[channel] = factor * row.norm()


def _norm_readers(
    model: transformers.PreTrainedModel, ids: torch.Tensor
) -> list[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Each norm whose very output is the input of linears, with those linears by name."""
    made: dict[int, nn.Module] = {}
    alive = []  # outputs must not be freed while their ids are compared
    readers: dict[nn.Module, dict[str, nn.Linear]] = {}

    def after_norm(module, _args, output):
        made[id(output)] = module
        alive.append(output)

    def before_linear(name):
        def hook(module, args):
            if id(args[0]) in made:
                readers.setdefault(made[id(args[0])], {})[name] = module

        return hook

    handles = []
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            handles.append(module.register_forward_hook(after_norm))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(before_linear(name)))
    try:
        model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return list(readers.items())


def _scale(norm: nn.Module, linears: Iterable[nn.Linear], factor: float, channels: Sequence[int]) -> None:
    """Multiply output channels of a norm and divide the matching weight columns of its readers, in place."""
    chosen = list(channels)
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0  # Gemma multiplies by 1 + weight
    norm.weight[chosen] = (norm.weight[chosen] + offset) * factor - offset
    if getattr(norm, "bias", None) is not None:
        norm.bias[chosen] *= factor
    for linear in linears:
        linear.weight[:, chosen] /= factor


def sample_ids(batch: int, length: int, seed: int = 0, bos: bool = True) -> torch.Tensor:
    """Random character ids, (batch, length), with BOS in front of each row unless `bos=False`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(CHARACTERS), (batch, length), generator=generator
    )
    if bos:
        ids[:, 0] = BOS
    return ids


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer(bos: bool = True, padding_side: str = "left") -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character, lossless on those, with a ChatML template (and its assistant masks).

    Ids match the `*_token_id` of every `tiny` model. With `bos=True` a text starts with `<s>`, as Llama's do; a chat
    does not, because its template writes its own markers.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS[UNK]))
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side=padding_side,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
