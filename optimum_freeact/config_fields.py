"""The fields of `FreeActConfig`: what they may be, what they are by default, and which are saved."""

from __future__ import annotations

from typing import Any


FORMAT_VERSION = 2
BITS = (4, 8, 16)
CHOICES = {
    "weight_bits": BITS,
    "activation_bits": BITS,
    "kv_bits": BITS,
    "activation_symmetric": (True, False),
    "transform": ("none", "hadamard", "kronecker", "orthogonal"),
    "channel_scale": ("none", "smoothquant", "closed_form"),
    "centring": ("none", "shared", "per_type"),
    "rounding": ("rtn", "gptq"),
    "calibration": ("closed_form", "learned"),
    "learned_start": ("closed_form", "random"),
    "learned_part": ("maps", "outputs"),
    "error_correction": (True, False),
    "propagate_error": (True, False),
    "sequential": (True, False),
    "rounding_order": ("energy", "columns"),
    "rounding_noise": (True, False),
    "rounding_shrinkage": (True, False),
    "rounding_refit": (True, False),
    "exclusive": ("none", "fixed", "closed_form"),
    "attention_compensation": (True, False),
    "embedding_bits": (8, 16),
}
# what a preset may leave open
DEFAULTS: dict[str, Any] = {
    "weight_bits": 4,
    "activation_bits": 4,
    "kv_bits": 16,
    "kv_rotation": None,
    "weight_group_size": None,
    "activation_group_size": None,
    "low_rank_budget": None,
    "loudness_limit": None,
    "smooth_alpha": 0.5,
    "learned_start": "closed_form",
    "learned_part": "maps",
    "learning_rate": 2e-3,
    "epochs": 15,
    "propagate_error": True,
    "sequential": False,
    "rounding_order": "energy",
    "rounding_noise": True,
    "rounding_shrinkage": False,
    "rounding_refit": False,
    "n_samples": 32,
    "seq_len": 512,
    "batch_size": 4,
    "seed": 0,
    "damping": 0.01,
    "modules_to_not_convert": None,
    "type_rules": None,
    "exclusive": "none",
    "attention_compensation": False,
    "discovered_types": 0,
    "exclusive_share": 1 / 32,
    "type_rank": 0,
    "embedding_bits": 16,
}
# known only while calibrating; never written
RUNTIME = ("dataset", "tokenizer", "calibration_device", "resume_dir", "progress", "typer", "across_processes")
# may be given anew when a saved model is loaded
LOADING = ("kv_bits", "kv_rotation", "typer")
# written by the quantizer for those who load
RECORDED = (
    "input_groups",
    "experts",
    "cluster_table",
    "exclusive_sizes",
    "weight_dtype",
    "cache_shapes",
    "calibration_record",
)
