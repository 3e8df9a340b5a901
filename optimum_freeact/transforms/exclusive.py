r"""Coordinates of the transformed input that belong to one token type: zero for every other type.

FreeAct (2603.01776) transforms tokens of type k with the shared columns of one matrix and an exclusive block of its own,
P_k = [U, U_k, 0, ...], and the weight with all of them; in code, the other types' blocks are zeroed after the transform.

What is exact: for type k, leaving out the coordinates J changes the output by \( (x A_J)(B_J W^\top) \), with A_J the
columns of the transform and B_J the rows of its inverse. It is zero for all inputs of the type only where they have no
energy in those directions (or no weight reads them); otherwise it is an error that the learning trades against rounding.
Since a grid that holds zero rounds no value worse than zeroing it, a mask can win only through a token's range.
"""

from __future__ import annotations

import torch


def block_sizes(shares: list[float], width: int) -> list[int]:
    """Coordinates of each type's exclusive block; all blocks together leave at least half of the width shared."""
    sizes = [int(width * share) for share in shares]
    over = sum(sizes) > width // 2
    return [size * (width // 2) // sum(sizes) for size in sizes] if over else sizes


def fixed_blocks(shares: list[float], width: int) -> torch.Tensor:
    """The paper's masks: exclusive blocks side by side at the end of the coordinates.

    Args:
        shares (`list[float]`): Share of the coordinates per type; a type with 0 has no block of its own and keeps all
            (the sink).
        width (`int`): d.

    Returns:
        `torch.Tensor` (`bool`) of shape `(n_types, d)`: which coordinates each type keeps.
    """
    keep = torch.ones(len(shares), width, dtype=torch.bool)
    start = width - sum(block_sizes(shares, width))
    for owner, size in enumerate(block_sizes(shares, width)):
        others = [kind for kind, share in enumerate(shares) if kind != owner and share > 0]
        keep[others, start : start + size] = False
        start += size
    return keep


def share_of(share: float | dict[str, float], linears: list[str]) -> float:
    """The share that holds for an input, by the last part of the names of the linears that read it."""
    if not isinstance(share, dict):
        return float(share)
    return max((float(share.get(name.rpartition(".")[2], 0.0)) for name in linears), default=0.0)
