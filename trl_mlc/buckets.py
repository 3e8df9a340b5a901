"""Divide prompts by length, so that short ones don't pay for long ones and there are not too many forwards."""

from __future__ import annotations

from collections.abc import Sequence


CUTS = 48  # lengths at which a bucket may end; more would not be worth the search
OVERHEAD = {"cuda": 4096, "cpu": 32}  # what one more forward and backward costs, in tokens


def length_buckets(lengths: Sequence[int], most: int, overhead: int = 0) -> list[list[int]]:
    """The division that runs the fewest tokens, padding included, plus `overhead` tokens for each bucket.

    Translations of one prompt differ several times in length, so that equal parts still pad by half; the best ends of
    parts are found by dynamic programming over at most `CUTS` places.

    Args:
        lengths (`Sequence[int]`): tokens of each prompt.
        most (`int`): at most this many buckets.
        overhead (`int`, *optional*, defaults to 0): tokens that a bucket costs by itself.

    Returns:
        `list[list[int]]`: indices into `lengths`, each exactly once, shorter prompts first.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ends = [n for n in range(1, len(order) + 1) if n == len(order) or lengths[order[n]] > lengths[order[n - 1]]]
    step = -(-len(ends) // CUTS)
    ends = [0, *sorted({*ends[step - 1 :: step], *ends[-1:]})]
    # cheapest[k]: cost and previous end of the best division of the first ends[k] prompts, for each number of buckets
    cheapest = [{0: (0, 0)}]
    for k in range(1, len(ends)):
        here: dict[int, tuple[int, int]] = {}
        width = lengths[order[ends[k] - 1]]
        for j in range(k):
            cost = width * (ends[k] - ends[j]) + overhead
            for used, (before, _) in cheapest[j].items():
                if used < most and before + cost < here.get(used + 1, (float("inf"),))[0]:
                    here[used + 1] = (before + cost, j)
        cheapest.append(here)
    found, k = [], len(ends) - 1
    used = min(cheapest[k], key=lambda n: cheapest[k][n][0])
    while k > 0:
        j = cheapest[k][used][1]
        found.append(order[ends[j] : ends[k]])
        k, used = j, used - 1
    return found[::-1]
