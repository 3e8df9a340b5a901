"""Named sets of defaults. A preset only fills what the caller leaves open."""

from __future__ import annotations


PLAIN = {
    "activation_symmetric": True,
    "transform": "none",
    "channel_scale": "none",
    "centring": "none",
    "low_rank": 0,
    "rounding": "rtn",
    "rounding_passes": 0,
    "activation_clip": 1.0,
    "weight_clip": 1.0,
    "token_types": ["text"],
    "calibration": "closed_form",
    "error_correction": False,
}

OURS = {
    "activation_symmetric": False,
    "transform": "hadamard",
    "channel_scale": "none",
    "centring": "per_type",
    "loudness_limit": "auto",
    "rounding": "gptq",
    "rounding_passes": 2,
    "activation_clip": "search",
    "weight_clip": "search",
    "token_types": ["text", "sink", "auto"],
    "calibration": "closed_form",
    "learned_part": "outputs",
    "error_correction": False,
}

PRESETS: dict[str, dict] = {
    # Round to nearest, per channel and per token: the floor every method must clear.
    "rtn": dict(PLAIN),
    # SmoothQuant (2211.10438): channel scales with alpha 0.5, round to nearest.
    "smoothquant": {**PLAIN, "channel_scale": "smoothquant"},
    # QuaRot (2404.00456): Hadamard rotation, GPTQ weights, symmetric activations clipped at 0.9 (its own default).
    "quarot": {**PLAIN, "transform": "hadamard", "rounding": "gptq", "activation_clip": 0.9, "weight_clip": "search"},
    # FlatQuant (2410.09426): learned Kronecker transforms, channel scales and clips from a random orthogonal start,
    # 15 epochs, learning rate 5e-3, inputs of the full-precision stream, round to nearest.
    "flatquant": {
        **PLAIN,
        "transform": "kronecker",
        "channel_scale": "smoothquant",
        "calibration": "learned",
        "smooth_alpha": 0.3,
        "learned_start": "random",
        "learning_rate": 5e-3,
        "epochs": 15,
        "propagate_error": False,
    },
    # FreeAct as in the paper (2603.01776): FlatQuant with token types told by id, for each a block of d/32 coordinates
    # that are zero for the others, clipping per type, orthogonal start and learning rate 1e-3. On a model with one type
    # the masks are empty.
    "freeact-paper": {
        **PLAIN,
        "transform": "kronecker",
        "channel_scale": "smoothquant",
        "token_types": ["text", "auto"],
        "exclusive": "fixed",
        "calibration": "learned",
        "smooth_alpha": 0.3,
        "learned_start": "random",
        "learning_rate": 1e-3,
        "epochs": 15,
        "propagate_error": False,
    },
    # Ours, in closed form: means per type subtracted, the sink a type of its own, the strongest directions carried by a
    # one-byte branch, Hadamard rotation, second-order rounding with a second choice, and grids of few numbers each. Each
    # choice is an ablation in benchmarks/results/accuracy.json. The ranks are what fits into 0.30 of the bfloat16 bytes
    # beside the groups' scales.
    "freeact": {
        "weight_group_size": 32,
        "activation_group_size": 16,
        "low_rank": 48,
        "low_rank_budget": 0.049,
        **OURS,
    },
    # The same with one grid per weight row and per token, which products over integers need throughout: a GPU's prefill is
    # fastest so, at a loss of quality. Rank 24 is what fits into the same bytes. Shrinkage to the noise, which is larger here,
    # does harm (an ablation too).
    "freeact-fast": {
        "low_rank": 24,
        **OURS,
    },
    # The same without a branch. A branch needs a projection of the whole row before the row may be rotated; without one a
    # GPU rounds a row in one pass. What a branch gains is lost (an ablation).
    "freeact-fastest": {
        "low_rank": 0,
        **OURS,
    },
}
