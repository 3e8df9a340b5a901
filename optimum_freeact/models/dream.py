"""Dream (2508.15487) on transformers' Qwen2: the same layers without a causal mask, logits shifted by one.

    import optimum_freeact.models.dream
    model = AutoModelForMaskedLM.from_pretrained("Dream-org/Dream-v0-Instruct-7B")

Dream was made from an autoregressive model and kept its habit: the logits at a position are those of the *next* token.
[`denoise`](denoise.py) shifts them.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from optimum_freeact.models.bidirectional import Bidirectional, understand_remote_fields


class DreamConfig(Qwen2Config):
    """A Qwen2 configuration with a mask token.

    Args:
        mask_token_id (`int`, *optional*): Id of [MASK].
        shifted_logits (`bool`, *optional*, defaults to `True`): Logits at position i are those of token i + 1.
    """

    model_type = "Dream"
    mask_token_id: int | None = None
    shifted_logits: bool = True

    def __post_init__(self, **kwargs):
        understand_remote_fields(self, kwargs)
        super().__post_init__(**kwargs)


class DreamModel(Bidirectional, Qwen2Model):
    """The decoder; see [`Bidirectional`]."""

    config_class = DreamConfig


class DreamForMaskedLM(Qwen2ForCausalLM):
    """[`DreamModel`] with its head."""

    config_class = DreamConfig

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamModel(config)
        self.post_init()


AutoConfig.register("Dream", DreamConfig, exist_ok=True)
AutoModel.register(DreamConfig, DreamModel, exist_ok=True)
AutoModelForCausalLM.register(DreamConfig, DreamForMaskedLM, exist_ok=True)
AutoModelForMaskedLM.register(DreamConfig, DreamForMaskedLM, exist_ok=True)
