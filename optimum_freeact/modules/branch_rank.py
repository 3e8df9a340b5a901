"""How wide the high-precision branch of an input is: what is wanted, and what fits into a budget of bytes."""

from __future__ import annotations

from optimum_freeact.config import FreeActConfig
from optimum_freeact.numerics.byte_rows import group_size as group_size_of
from optimum_freeact.numerics.kronecker import factor_pair


LEAST_RANK = 8  # of a branch, whatever else an input's tensors take


def rank_of(config: FreeActConfig, in_features: int, out_features: list[int]) -> int:
    """Rank of the branch: the config's, at most an eighth of the width; 0 where nothing is rounded that it could spare.

    With `low_rank_budget` it is cut further, to what fits into this share of the bfloat16 bytes of the linears that read the
    input, beside everything else that is stored but the codes.

    Args:
        config ([`FreeActConfig`]): Settings.
        in_features (`int`): Width of the input.
        out_features (`list[int]`): Of the linears that read it.
    """
    if config.weight_bits == config.activation_bits == 16:
        return 0
    rank, n, m = min(config.low_rank, in_features // 8), in_features, sum(out_features)
    if config.low_rank_budget is None:
        return rank
    types, means = config.n_types, {"none": 0, "shared": 1, "per_type": config.n_types}[config.centring]
    a, b = factor_pair(n)
    stored = 4 * types + 2 * means * n  # clips, means
    stored += {"hadamard": 2, "kronecker": 4}.get(config.transform, 0) * (a * a + b * b)
    stored += 4 * n if config.channel_scale != "none" else 0
    if config.weight_bits < 16:
        stored += m * (4 + (n // config.weight_group_size if config.weight_group_size else 0))
    stored += 4 * m + max(0, means - 1) * _shift_bytes(config, out_features) if means else 0
    each = n + m + 4 * (1 + len(out_features))
    fits = int(config.low_rank_budget * 2 * n * m - stored) // each
    return min(rank, max(fits, LEAST_RANK))


def _shift_bytes(config: FreeActConfig, out_features: list[int]) -> int:
    """Bytes of what a further type's output biases differ by."""
    if config.weight_bits == 16:
        return 4 * sum(out_features)
    return sum(m + 2 * (m // group_size_of(m)) for m in out_features)


def type_rank_of(config: FreeActConfig, in_features: int) -> int:
    """Further columns of the branch for each type alone; 0 where nothing is rounded."""
    if config.weight_bits == config.activation_bits == 16:
        return 0
    return min(config.type_rank, in_features // (8 * config.n_types))
