"""Tiny random multimodal models of real families with inputs that hold placeholders: built in memory, no download.

Each family gives a model and the arguments of a forward of two sequences; `placeholders` says which ids stand for what.
"""

from collections.abc import Callable

import torch
import transformers

from tests.helpers.tiny_models import randomize_


IMAGE, VIDEO, AUDIO, START, END = 110, 111, 114, 112, 113
_TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def sequence(n_places: int, token: int, seed: int = 0, before: int = 3, after: int = 6) -> torch.Tensor:
    """Two rows of text around `n_places` placeholders, each with BOS in front."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, 100, (2, before + after), generator=generator)
    text[:, 0] = 1
    return torch.cat((text[:, :before], torch.full((2, n_places), token), text[:, before:]), 1)


def _pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _qwen2_5_vl() -> tuple:
    sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={**sight, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    pixels = {"pixel_values": _pixels(32, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return transformers.Qwen2_5_VLForConditionalGeneration, config, sequence(4, IMAGE), pixels


def _qwen3_vl() -> tuple:
    sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config={
            **_TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
        },
        vision_config={
            **sight,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    ids = sequence(4, IMAGE)
    pixels = {"pixel_values": _pixels(32, 3 * 2 * 16 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return (
        transformers.Qwen3VLForConditionalGeneration,
        config,
        ids,
        {**pixels, "mm_token_type_ids": (ids == IMAGE).long()},
    )


def _llava() -> tuple:
    sight = transformers.CLIPVisionConfig(**_SIGHT, image_size=16, patch_size=8, projection_dim=32)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=sight,
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
    )
    return (
        transformers.LlavaForConditionalGeneration,
        config,
        sequence(4, IMAGE),
        {"pixel_values": _pixels(2, 3, 16, 16)},
    )


def _internvl() -> tuple:
    sight = transformers.InternVLVisionConfig(**_SIGHT, image_size=[16, 16], patch_size=[4, 4])
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_TEXT), vision_config=sight, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return (
        transformers.InternVLForConditionalGeneration,
        config,
        sequence(4, IMAGE),
        {"pixel_values": _pixels(2, 3, 16, 16)},
    )


def _smolvlm() -> tuple:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config={**_SIGHT, "image_size": 32, "patch_size": 8},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    pixels = {"pixel_values": _pixels(2, 1, 3, 32, 32)}
    return transformers.SmolVLMForConditionalGeneration, config, sequence(4, IMAGE), pixels


def _idefics3() -> tuple:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config={**_SIGHT, "image_size": 32, "patch_size": 8},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    pixels = {"pixel_values": _pixels(2, 1, 3, 32, 32)}
    return transformers.Idefics3ForConditionalGeneration, config, sequence(4, IMAGE), pixels


def _gemma3() -> tuple:
    text = {**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    config = transformers.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**_SIGHT, "image_size": 32, "patch_size": 8},
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    return (
        transformers.Gemma3ForConditionalGeneration,
        config,
        sequence(4, IMAGE),
        {"pixel_values": _pixels(2, 3, 32, 32)},
    )


def _qwen2_audio() -> tuple:
    sound = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    config = transformers.Qwen2AudioConfig(
        audio_config={**sound, "num_mel_bins": 16, "max_source_positions": 8},
        text_config=transformers.Qwen2Config(**_TEXT),
        audio_token_index=AUDIO,
    )
    heard = {"input_features": _pixels(2, 16, 16), "feature_attention_mask": torch.ones(2, 16, dtype=torch.long)}
    return transformers.Qwen2AudioForConditionalGeneration, config, sequence(4, AUDIO), heard


MULTIMODAL: dict[str, Callable[[], tuple]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2_audio": _qwen2_audio,
}


def tiny_multimodal(family: str, seed: int = 0) -> tuple[transformers.PreTrainedModel, dict]:
    """A small random model of `family` in float32, and the arguments of a forward of two sequences."""
    model_class, config, ids, senses = MULTIMODAL[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation="eager")
    randomize_(model, seed)
    return model.float().eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **senses}
