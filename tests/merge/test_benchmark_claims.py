"""The claims of the merge benchmarks follow from their rows alone, and are absent where nothing was measured."""

import json

import pytest

from benchmarks.merge import (
    adaptation_claims,
    exactness_claims,
    gate_claims,
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


def adapted(task, arm, seed, valid, nll, rate=1e-4, **more):
    place = {"task": task, "arm": arm, "seed": seed, "rate": rate, **more}
    points = {"before": (9.0, 9.0), "after": (valid, nll), "last": (8.0, 8.0)}
    return [
        place | {"when": when, "metric": metric, "value": value}
        for when, point in points.items()
        for metric, value in zip(("valid", "nll"), point)
    ]


def test_adaptation_takes_the_best_control_and_the_arm_that_validation_chose():
    rows = [{"metric": "budget: steps", "value": 96}]
    for seed, shift in enumerate((-0.1, 0.1)):
        rows += adapted("code", "none", seed, 2.0, 2.0 + shift, rate=1e-4)
        rows += adapted("code", "none", seed, 3.0, 1.0, rate=1e-3)  # validation speaks against this rate
        rows += adapted("code", "shrink", seed, 2.1, 2.1)
        rows += adapted("code", "teacher, random donor", seed, 2.2, 1.95, share=0.5)
        rows += adapted("code", "teacher", seed, 1.8, 1.85 + shift, share=0.5)
        rows += adapted("code", "teacher", seed, 1.9, 1.5, share=0.9)  # nor is a share chosen on held-out text
        rows += adapted("code", "merge", seed, 1.9, 1.7)
    rows += adapted("code", "stream", 0, 1.0, 1.0)  # cut off before the second seed
    (one,) = adaptation_claims.claims(rows)
    assert one["value"] == pytest.approx(1.95 - 1.85)
    assert one["holds"]
    assert "'teacher' against 'teacher, random donor'" in one["how"]
    assert "2 seed(s)" in one["how"]
    table = [row for row in adaptation_claims.summary(rows) if row["metric"] == "mean nll"]
    means = {(row["arm"], row["when"]): row["value"] for row in table}
    assert means["none", "before"] == 9.0
    assert means["none", "after"] == pytest.approx(2.0)
    assert means["teacher", "after"] == pytest.approx(1.85)
    assert ("stream", "after") not in means
    assert adaptation_claims.claims([*rows, *adaptation_claims.summary(rows)]) == [one]
    rows += adapted("french", "none", 0, 4.0, 4.0) + adapted("french", "teacher", 0, 3.9, 3.98, share=0.5)
    (one,) = adaptation_claims.claims(rows)
    assert one["value"] == pytest.approx(0.02)  # the smallest over tasks
    assert not one["holds"]
    assert adaptation_claims.claims([row for row in rows if row.get("arm") in (None, "none", "shrink")]) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_real_cost_claims_time_and_memory_on_a_cpu_only(device):
    rows = [
        {"device": device, "step": "plan", "metric": "minutes", "value": 4.0},
        {"device": device, "step": "merge", "metric": "minutes", "value": 1.0},
        {"device": device, "step": "both", "metric": "peak resident GB", "value": 7.0},
        {"layer": 0, "metric": "confidence", "value": 0.9},
    ]
    expected = {"merge.cpu_minutes": (5.0, True), "merge.cpu_peak_gb": (7.0, False)} if device == "cpu" else {}
    assert values(real_cost_claims.claims(rows)) == expected


def test_the_gate_counts_blocks_it_leaves_open():
    rows = [
        {"task": "code", "seed": 0, "metric": "confidence", "value": 0.1},
        {"task": "code", "seed": 1, "metric": "confidence", "value": 0.6},
        {"metric": "recipe alpha", "value": 0.05},
        {"metric": "confidence below which the gate closes", "value": 0.5},
    ]
    assert values(gate_claims.claims(rows)) == {"merge.random_donor_gate_alpha": (0.025, False)}
    assert gate_claims.claims(rows[2:]) == []


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


def test_what_an_examples_report_says(tmp_path):
    from benchmarks.merge.examples import EXAMPLES, FOLDER, rows_of

    assert rows_of("code", tmp_path) == []
    folder = tmp_path / "work" / "code-merge.report"
    folder.mkdir(parents=True)
    losses = [
        {"model": "target", "loss": 3.0, "perplexity": 20.1},
        {"model": "merged", "loss": 2.5, "perplexity": 12.2},
    ]
    told = {"losses": losses, "tokens": 40, "tensors": {"a": {}, "b": {}}}
    (folder / "report.json").write_text(json.dumps(told))
    rows = rows_of("code", tmp_path)
    assert [(row.get("model"), row["metric"], row["value"]) for row in rows] == [
        ("target", "nats per token", 3.0),
        ("merged", "nats per token", 2.5),
        (None, "scored tokens", 40),
        (None, "merged tensors", 2),
    ]
    assert all((FOLDER / f"{name}.yml").is_file() for name in EXAMPLES)
