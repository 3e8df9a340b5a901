"""Random models of a Llama's shape: in bfloat16, quantized with all of a preset's parts, or quantized as
published methods do in their code (fake quantization: weights and activations rounded, products in bfloat16).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.embeddings import FreeActEmbedding, FreeActHead
from optimum_freeact.modules.layout import LLAMA_LIKE
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.runtime import activate
from optimum_freeact.modules.surgery import build_empty
from optimum_freeact.numerics.affine import fake_quantize
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair, kron_apply
from optimum_freeact.transforms.affine_map import InputMap
from optimum_freeact.type_state import attach_state


SHAPES: dict[str, dict] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
           "num_hidden_layers": 32, "vocab_size": 128256, "rope_theta": 500000.0},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 128},
}  # fmt: skip


def shared_attention(module, query, key, value, attention_mask, scaling=None, **others):
    """transformers' SDPA, but with SDPA's own way for heads that share keys and values (`enable_gqa`), which transformers leaves
    aside where there is a mask; of torch's ways the fastest for one new token and a static cache.
    """
    if query.shape[2] > 1 or query.shape[1] == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    y = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa_gqa", shared_attention)
AttentionMaskInterface.register("sdpa_gqa", sdpa_mask)


def shape_config(shape: str, layers: int | None = None, attention: str = "sdpa") -> LlamaConfig:
    """A Llama's configuration, with another number of layers if given."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config._attn_implementation = attention
    return config


def plain(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """Random bfloat16 model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return fill(model, device)


def fill(model: nn.Module, device: str) -> nn.Module:
    """Random values for every plain parameter of a model on the meta device."""
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    return model.requires_grad_(False)


def groups() -> list[list[str]]:
    """Which linears of a block share their input."""
    return [[f"{parent}.{leaf}" for leaf in leaves] for parent, items in LLAMA_LIKE.items() for leaves in items]


@torch.no_grad()
def quantized(config: PretrainedConfig, device: str, **changes) -> PreTrainedModel:
    """The same quantized with a preset (`changes` to its settings) and random numbers for all it stores."""
    settings = FreeActConfig(**{"preset": "freeact-fastest", "token_types": ["text", "sink"], **changes})
    settings.input_groups, settings.weight_dtype = {"*": groups()}, "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    build_empty(model, settings, attach_state(model))
    model = fill(model, device)
    generator, made = torch.Generator().manual_seed(0), {}
    for module in model.modules():
        if isinstance(module, FreeActInput):
            d = module.in_features
            if d not in made:
                left, right = (flat_rotation(n, generator).float().to(device) for n in factor_pair(d))
                basis = None
                if module.basis is not None:
                    basis = torch.linalg.qr(torch.randn(d, module.basis.shape[1], device=device))[0]
                mean = torch.randn(module.mean.shape, device=device) * 0.1 if module.mean is not None else None
                scale = torch.rand(d, device=device) + 0.5 if module.channel_scale is not None else None
                made[d] = InputMap(mean, scale, basis, left, right)
            module.store(made[d])
            module.clip.fill_(0.9)
        elif isinstance(module, FreeActLinear):
            module.weight.data.random_(0, 256)
            module.qscale.fill_(0.02 / 4.6 / (1 if module.weight_group_scale is None else 73))
            if module.weight_group_scale is not None:
                module.weight_group_scale.random_(-127, 128)
            if module.type_bias is not None:
                module.type_bias.normal_(std=0.02)
            if module.type_shift is not None:
                module.type_shift.random_(-127, 128)
                module.type_shift_scale.fill_(3e-4)
            if module.low_rank is not None:
                module.low_rank.random_(-127, 128)
                module.low_rank_scale.fill_(0.02 / 73)
        elif isinstance(module, (FreeActEmbedding, FreeActHead)):
            module.weight.data.random_(-127, 128)
            module.qscale.fill_(0.02 / 73)
    activate(model, settings)
    return model


class FakeQuantizedLinear(nn.Module):
    """A linear as FlatQuant's and FreeAct's published code runs it: transform, round and restore, dense product."""

    def __init__(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor):
        super().__init__()
        self.weight, self.left, self.right = weight, left, right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows in, rows out."""
        return nn.functional.linear(fake_quantize(kron_apply(x, self.left, self.right), 4, False), self.weight)
