"""What the fit of a group of linears chooses once its map is known: clips of the input, biases by type, codes of the weight."""

from __future__ import annotations

import torch

from optimum_freeact.config import FreeActConfig
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.affine import fake_quantize
from optimum_freeact.rounding.gptq import gptq
from optimum_freeact.rounding.rtn import RoundedWeight, round_to_nearest
from optimum_freeact.transforms.affine_map import InputMap
from optimum_freeact.transforms.compensation import Compensation
from optimum_freeact.transforms.fit import MapSpec


ACTIVATION_CLIP_GRID = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)
# Tokens for each entry of an input below which its weight is not shrunk to the noise: the directions that are shrunk are those
# whose moments are known worst (docs/log.md). All that was measured has more.
MIN_SHRINKAGE_TOKENS = 6
MIN_ROWS_PER_TYPE = 16  # fewer sample rows of a type do not decide its own clip ratio or mean error


def map_spec(config: FreeActConfig, rank: int, type_rank: int = 0) -> MapSpec:
    """The part of the config that says what to fit."""
    fixed = config.calibration == "learned" and config.learned_start == "random"
    return MapSpec(
        config.transform,
        config.channel_scale,
        config.centring,
        rank,
        not fixed,
        smooth_alpha=config.smooth_alpha,
        type_rank=type_rank,
    )


def is_shrunk(config: FreeActConfig, moments: Moments) -> bool:
    """Whether weights that read an input with these moments are shrunk to its rounding noise."""
    return config.rounding_shrinkage and float(moments.count.sum()) >= MIN_SHRINKAGE_TOKENS * moments.shift.shape[1]


def fake_rows(z: torch.Tensor, config: FreeActConfig, clip: torch.Tensor | float) -> torch.Tensor:
    """Rows as the config rounds them."""
    return fake_quantize(
        z, config.activation_bits, config.activation_symmetric, clip, group_size=config.activation_group_size
    )


def search_clip(
    z: torch.Tensor, v: torch.Tensor, types: torch.Tensor, config: FreeActConfig, weights: torch.Tensor | None = None
) -> list[float]:
    """Clip ratio per type with the least output error ||(Q(z) - z) V^T||^2 over sample rows, which may have `weights`."""
    n = config.n_types
    if config.activation_bits >= 16:
        return [1.0] * n
    if config.activation_clip != "search":
        return [float(config.activation_clip)] * n
    errors, z, v = [], z.float(), v.float()
    gram = v.mT @ v  # |n V^T|^2 = n (V^T V) n^T: a product of the inputs' width for each ratio, not of the outputs'
    for ratio in ACTIVATION_CLIP_GRID:
        noise = fake_rows(z, config, ratio) - z
        errors.append((noise @ gram).mul_(noise).sum(-1))
    errors = torch.stack(errors)  # (ratios, rows)
    errors = errors if weights is None else errors * weights.to(errors.dtype)
    total = ACTIVATION_CLIP_GRID[int(errors.sum(1).argmin())] if n == 1 else None
    found = []
    for kind in range(n):
        rows = types == kind
        enough = int(rows.sum()) >= MIN_ROWS_PER_TYPE
        best = ACTIVATION_CLIP_GRID[int(errors[:, rows].sum(1).argmin())] if enough else None
        found.append(total or best)
    fallback = next((ratio for ratio in found if ratio is not None), 1.0)
    return [fallback if ratio is None else ratio for ratio in found]


def output_biases(
    moments: Moments,
    stored: InputMap,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    compensation: Compensation | None = None,
) -> torch.Tensor | None:
    """Bias per type, shape `(n_means or 1, out)`: W mu_k + b, or where errors are corrected the full-precision mean."""
    if compensation is not None:
        wanted = compensation.wanted(0 if stored.mean is None else len(stored.mean)) @ weight.double().mT
        if stored.mean is None:  # nothing is subtracted: what the mean of the inputs gives is in the product already
            wanted = wanted - compensation.of_weight(weight.double()) @ moments.mean()
        return wanted if bias is None else wanted + bias.double()
    if stored.mean is None:
        return None if bias is None else bias.double().unsqueeze(0)
    target = stored.mean
    if moments.paired:
        kinds = [None] if len(target) == 1 else range(len(target))
        target = target + torch.stack([moments.mean_of_pair(k) - moments.mean(k) for k in kinds])
    result = target @ weight.double().mT
    return result if bias is None else result + bias.double()


def round_weight(
    v: torch.Tensor, moments_z: torch.Tensor, config: FreeActConfig, learned_clip: torch.Tensor | None = None
) -> RoundedWeight | None:
    """Codes and scales of the transformed weight, `None` at 16 bits.

    `learned_clip` of shape `(out, groups, 1)` replaces the config's clip when rounding to nearest.
    """
    if config.weight_bits == 16:
        return None
    size = config.weight_group_size or v.shape[1]
    clip = None if config.weight_clip == "search" else float(config.weight_clip)
    if config.rounding == "rtn" and learned_clip is not None:
        clip = learned_clip.to(v.device)
    if config.rounding == "rtn":
        return round_to_nearest(v.float(), config.weight_bits, size, clip)
    by_energy = config.rounding_order == "energy"
    return gptq(
        v.float(),
        moments_z,
        config.weight_bits,
        size,
        config.damping,
        clip,
        config.rounding_passes,
        by_energy,
        config.rounding_refit,
    )
