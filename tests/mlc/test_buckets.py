"""The cheapest division by length, against trying all of them."""

from itertools import combinations

import pytest

from trl_mlc.buckets import CUTS, length_buckets


def cost(buckets, lengths, overhead):
    return sum(max(lengths[i] for i in bucket) * len(bucket) + overhead for bucket in buckets)


@pytest.mark.parametrize("overhead", [0, 3, 40])
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_no_division_is_cheaper(most, overhead):
    lengths = [7, 3, 3, 12, 5, 30, 8, 4]
    found = length_buckets(lengths, most, overhead)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(lengths)))
    assert len(found) <= most
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    every = [
        [order[a:b] for a, b in zip((0, *cuts), (*cuts, len(order)), strict=True)]
        for count in range(most)
        for cuts in combinations(range(1, len(order)), count)
    ]
    assert cost(found, lengths, overhead) == min(cost(division, lengths, overhead) for division in every)


def test_many_lengths_are_divided_nearly_as_well_and_none_is_lost():
    lengths = [1 + (i * i) % 997 for i in range(400)]
    found = length_buckets(lengths, 6)
    assert sorted(i for bucket in found for i in bucket) == list(range(400))
    order = sorted(lengths)
    equal = sum(order[i + 66] * 67 for i in range(0, 402 - 67, 67)) + order[-1] * 65
    assert len(set(lengths)) > CUTS
    assert cost(found, lengths, 0) < equal


def test_one_prompt_and_equal_prompts_stay_together():
    assert length_buckets([5], 3) == [[0]]
    assert length_buckets([4, 4, 4], 3) == [[0, 1, 2]]
    assert length_buckets([4, 4, 9], 3, overhead=1000) == [[0, 1, 2]]
