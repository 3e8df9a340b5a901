"""The accuracy benchmark's claims follow from rows."""

import pytest

from benchmarks.accuracy.claims import claims, excess, expected


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def nll_rows(model="smollm2", **excesses):
    """Rows of full precision (3.0 and 4.0) and of methods with the given excess, a number or one a seed."""
    rows = []
    for method, given in {"fp": 0.0, **excesses}.items():
        for seed, value in enumerate(given if isinstance(given, list) else [given]):
            for text, base in (("handbook", 3.0), ("brown", 4.0)):
                row = {"model": model, "method": method.replace("_", "-"), "text": text, "metric": "nll", "seed": seed}
                rows.append({**row, "setting": "w16a16" if method == "fp" else "w4a4", "value": base + value})
    return rows


RIVALS = {
    "quarot_search": 0.7,
    "quarot_published": 0.8,
    "quarot_published_asym": 0.9,
    "quarot_groups": 0.3,
    "quarot_groups_asym": 0.2,
    "freeact_fast": 0.1,
}


def size_row(value, model="smollm2"):
    row = {"model": model, "group": "preset", "method": "freeact", "setting": "w4a4", "metric": "size_ratio"}
    return {**row, "value": value, "seed": 0}


def by_id(rows):
    return {entry["id"]: entry for entry in claims(rows)}


def test_claims_hold_on_rows_within_the_targets():
    rows = nll_rows(
        **RIVALS,
        freeact=0.1,
        quarot=0.5,
        quarot_asym=0.4,
        quarot_asym_search=0.45,
        flatquant=0.2,
        freeact_learned=0.08,
    )
    found = by_id([*rows, size_row(0.28)])
    assert list(found) == expected(["smollm2"])
    assert all(entry["holds"] for entry in found.values())
    values = [round(entry["value"], 9) for entry in found.values()]
    assert values == [0.25, 0.5, 0.4, 0.125, 0.5, 0.25, 0.28]
    assert "quarot-asym is the best of" in found["accuracy.smollm2.w4a4.excess_over_quarot"]["how"]


def test_claims_fall_short_on_rows_beyond_the_targets():
    weak = {**RIVALS, "quarot_published": 0.5, "freeact_fast": 0.3}
    rows = nll_rows(
        **weak, freeact=0.2, quarot=0.4, quarot_asym=0.5, quarot_asym_search=0.6, flatquant=0.2, freeact_learned=0.15
    )
    found = by_id([*rows, size_row(0.31)])
    assert list(found) == expected(["smollm2"])
    assert not any(entry["holds"] for entry in found.values())
    assert "nll[quarot] " in found["accuracy.smollm2.w4a4.excess_over_quarot"]["how"]


def test_several_seeds_count_by_their_mean_and_state_their_spread():
    rows = nll_rows(
        **{**RIVALS, "quarot_search": 2.0, "quarot_published": 2.0, "quarot_published_asym": 2.0},
        freeact=[0.1, 0.3],
        quarot=[0.8, 1.2],
        quarot_asym=2.0,
        quarot_asym_search=3.0,
        flatquant=1.0,
        freeact_learned=0.1,
    )
    entry = by_id(rows)["accuracy.smollm2.w4a4.excess_over_quarot"]
    assert entry["value"] == pytest.approx(0.2)
    assert "0.2 ± 0.14 (standard deviation) / 1 ± 0.28 (standard deviation)" in entry["how"]
    assert "single seeds give 0.125 to 0.25" in entry["how"]


def test_seeds_that_one_side_lacks_do_not_count():
    rivals = dict.fromkeys(RIVALS, 2.0) | {"quarot_asym": 2.0, "quarot_asym_search": [2.0, 2.0]}
    rows = nll_rows(**rivals, freeact=[0.2, 0.4, 5.0], quarot=[1.0, 1.0], flatquant=[1.0])
    found = by_id(rows)
    assert found["accuracy.smollm2.w4a4.excess_over_quarot"]["value"] == pytest.approx(0.3)
    assert "seeds 0, 1:" in found["accuracy.smollm2.w4a4.excess_over_quarot"]["how"]
    assert found["accuracy.smollm2.w4a4.excess_over_flatquant"]["value"] == pytest.approx(0.2)


@pytest.mark.parametrize("lost", ["fp", "freeact", "quarot-asym-search", "quarot-published"])
def test_a_claim_whose_rows_are_missing_is_not_made(lost):
    rows = nll_rows(
        **RIVALS, freeact=0.1, quarot=0.4, quarot_asym=0.5, quarot_asym_search=0.6, flatquant=0.2, freeact_learned=0.1
    )
    kept = [row for row in rows if row["method"] != lost]
    unmeasured = [{**row, "value": None, "note": "x"} if row["method"] == lost else row for row in rows]
    for some in (unmeasured,) if lost == "quarot-published" else (kept, unmeasured):
        assert "accuracy.smollm2.w4a4.excess_over_quarot" not in by_id(some)


def test_a_seed_without_one_of_the_texts_does_not_count():
    rows = nll_rows(freeact=[0.1, 0.3])
    rows = [row for row in rows if (row["seed"], row["text"]) != (1, "brown")]
    assert excess(rows, "smollm2", "freeact", "w4a4") == {0: pytest.approx(0.1)}


def test_models_are_claimed_apart():
    methods = {
        **RIVALS,
        "freeact": 0.1,
        "quarot": 0.4,
        "quarot_asym": 0.5,
        "quarot_asym_search": 0.6,
        "flatquant": 0.2,
        "freeact_learned": 0.1,
    }
    rows = [*nll_rows(**methods), *nll_rows("qwen2.5", **{**methods, "freeact": 0.2})]
    found = by_id(rows)
    assert found["accuracy.smollm2.w4a4.excess_over_quarot"]["value"] == pytest.approx(0.25)
    assert found["accuracy.qwen2.5.w4a4.excess_over_quarot"]["value"] == pytest.approx(0.5)


def cost_rows(seconds, peak, group="cpu_cost"):
    row = {"model": "smollm2", "group": group, "method": "freeact", "setting": "w4a4", "seed": 0}
    values = {"calibration_seconds": seconds, "peak_gb": peak}
    return [{**row, "metric": metric, "value": value} for metric, value in values.items()]


@pytest.mark.parametrize(("seconds", "peak", "holds"), [(120.0, 2.5, [True, True]), (181.0, 3.1, [False, False])])
def test_cost_is_claimed_from_the_cpu_run_alone(seconds, peak, holds):
    found = by_id(cost_rows(seconds, peak))
    assert list(found) == ["accuracy.smollm2.calibration_seconds", "accuracy.smollm2.calibration_peak_gb"]
    assert [entry["holds"] for entry in found.values()] == holds
    assert claims(cost_rows(seconds, peak, group="preset")) == []
