"""The claims of the merge benchmarks follow from their rows alone, and are absent where nothing was measured."""

import pytest

from benchmarks.merge import (
    adaptation_claims,
    exactness_claims,
    h100_claims,
    real_cost_claims,
    relatives_claims,
    solver_times_claims,
)


def values(claims):
    return {one["id"]: (one["value"], one["holds"]) for one in claims}


def test_exactness_takes_the_worst_error_of_each_copy():
    rows = [
        {"donor": "same", "metric": "weights", "value": 1e-7},
        {"donor": "same", "metric": "logits", "value": 2e-7},
        {"donor": "twice as wide", "metric": "logits", "value": 1e-4},
        {"donor": "same", "preset": "paper", "metric": "logits", "value": 1.0},
    ]
    assert values(exactness_claims.claims(rows)) == {
        "merge.exact.same": (2e-7, True),
        "merge.exact.twice_as_wide": (1e-4, False),
    }


def test_relatives_take_the_largest_gap():
    rows = [{"metric": "nll", "value": 3.0}, {"metric": "gap", "value": 0.002}, {"metric": "gap", "value": 0.02}]
    assert values(relatives_claims.claims(rows)) == {"merge.relatives.loss_gap_to_interpolation": (0.02, False)}
    assert relatives_claims.claims(rows[:1]) == []


def test_adaptation_compares_means_over_seeds_after_training():
    losses = {"none": (1.0, 1.2), "shrink": (1.3, 1.3), "teacher": (0.9, 0.9), "merge": (1.2, 1.4)}
    rows = [
        {"arm": arm, "when": when, "seed": seed, "metric": "nll", "value": value if when == "after" else 0.0}
        for arm, pair in losses.items()
        for seed, value in enumerate(pair)
        for when in ("before", "after")
    ]
    (one,) = adaptation_claims.claims([*rows, {"metric": "budget: steps", "value": 200}])
    assert one["value"] == pytest.approx(0.2)
    assert "(none)" in one["how"]
    assert "(teacher)" in one["how"]
    assert "2 seed(s)" in one["how"]
    assert adaptation_claims.claims([row for row in rows if row["arm"] in ("none", "shrink")]) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_real_cost_claims_time_and_memory_on_a_cpu_only(device):
    rows = [
        {"device": device, "step": "plan", "metric": "minutes", "value": 4.0},
        {"device": device, "step": "merge", "metric": "minutes", "value": 1.0},
        {"device": device, "step": "both", "metric": "peak resident GB", "value": 7.0},
        {"donor": "real", "metric": "confidence", "value": 0.9},
        {"donor": "random", "metric": "confidence", "value": 0.1},
        {"donor": "random", "metric": "confidence", "value": 0.6},
        {"metric": "recipe alpha", "value": 0.05},
        {"metric": "confidence below which the gate closes", "value": 0.5},
    ]
    expected = {"merge.random_donor_gate_alpha": (0.025, False)}
    if device == "cpu":
        expected |= {"merge.cpu_minutes": (5.0, True), "merge.cpu_peak_gb": (7.0, False)}
    assert values(real_cost_claims.claims(rows)) == expected


def test_h100_claims_nothing_of_miniatures_or_without_a_gpu():
    rows = [
        {"shapes": "8b to 1b", "step": "plans", "metric": "seconds", "value": 60.0},
        {"shapes": "8b to 1b", "step": "merge", "metric": "seconds", "value": 30.0},
        {"shapes": "8b to 1b", "step": "all", "metric": "peak device GB", "value": 20.0},
        {"shapes": "8b to 1b", "step": "plans", "metric": "bundle GB", "value": 3.0},
    ]
    assert values(h100_claims.claims(rows)) == {
        "merge.h100_minutes_8b_to_1b": (1.5, True),
        "merge.h100_peak_gb": (20.0, True),
        "merge.bundle_gb": (3.0, False),
    }
    assert h100_claims.claims([row | {"shapes": "tiny"} for row in rows]) == []
    assert h100_claims.claims([row | ({"value": None} if "peak" in row["metric"] else {}) for row in rows]) == []


def test_solver_times_claim_nothing():
    assert solver_times_claims.claims([{"metric": "seconds", "value": 1.0}]) == []
