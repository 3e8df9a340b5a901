"""How much is trained, calibrated and scored: at full size, and in the miniature."""

from __future__ import annotations


_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURES = {
    "scenes": 384,
    "score_batch": 64,
    "exact": 192,
    "pool": 24,
    "n_samples": 8,
    "batch_size": 1,
    "per_input": 16,
}
_TINY_PICTURES = {
    "names": 512,
    "per_input": 2,
    "scenes": 8,
    "score_batch": 8,
    "exact": 4,
    "pool": 12,
    "n_samples": 4,
    "batch_size": 2,
}
_TINY_IDS = {"image_id": 102, "start_id": 1, "end_id": 2}

FULL = {
    "diffusion": {
        "train": {"steps": 3000, "batch": 64, "length": 512, "part": 16},
        **{"windows": 24, "window": 512, "score_batch": 6, "generate": [96, 48]},
        **{"pool": 96, "n_samples": 32, "seq_len": 512, "batch_size": 4},
    },
    "vlm": {"train": {"steps": 3000, "batch": 96, "part": 48}, **_PICTURES, "candidates": 8, "names": 256},
    "three_types": {"train": {"steps": 3000, "batch": 96, "part": 48}, **_PICTURES, "candidates": 0, "names": 128},
}
TINY = {
    "diffusion": {
        "train": {"steps": 4, "batch": 8, "length": 32, "part": 3},
        **{"windows": 4, "window": 32, "score_batch": 4, "generate": [8, 4]},
        **{"pool": 24, "n_samples": 8, "seq_len": 32, "batch_size": 4, "mask_id": 103},
    },
    "vlm": {
        "train": {"steps": 4, "batch": 8, "part": 3},
        **_TINY_PICTURES,
        **{"candidates": 3, "mask_id": 103, "sight": _SIGHT, "ids": _TINY_IDS},
    },
    "three_types": {
        "train": {"steps": 4, "batch": 8, "part": 3},
        **_TINY_PICTURES,
        **{"candidates": 0, "mask_id": 103, "sight": _SIGHT, "ids": _TINY_IDS},
    },
}
