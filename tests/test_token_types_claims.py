"""The token types benchmark's claims follow from rows."""

import pytest

from benchmarks.token_types import cost_claims, run
from benchmarks.token_types.claims import claims, losses, won_back
from benchmarks.token_types.methods import bits


def rows_of(model="diffusion", metric="masked_nll", setting="w4a4", mode="whole", **lost):
    """Rows of full precision (3.0 and 4.0 at two ratios) and of methods that lose so much more, by seed."""
    rows = []
    for method, given in {"fp": [0.0], **lost}.items():
        for seed, value in enumerate(given if isinstance(given, list) else [given]):
            for ratio, base in ((0.15, 3.0), (0.5, 4.0)):
                row = {
                    "model": model,
                    "method": method.replace("_", "-"),
                    "mode": mode,
                    "ratio": ratio,
                    "metric": metric,
                }
                row |= {"setting": "w16a16" if method == "fp" else setting, "value": base + value, "seed": seed}
                rows.append(row)
    return rows


def by_id(rows):
    return {entry["id"]: entry for entry in claims(rows)}


def test_the_gap_won_back_is_what_flatquant_loses_and_we_do_not():
    rows = rows_of(flatquant=0.4, freeact_fast=[0.1, 0.2], freeact_paper=0.3)
    assert losses(rows, "diffusion", "freeact-fast", "w4a4") == pytest.approx({0: 3.6, 1: 3.7})
    assert won_back(rows, "diffusion", "freeact-fast", "w4a4") == pytest.approx(1 - 0.15 / 0.4)
    found = by_id(rows)
    assert found["token_types.diffusion.w4a4.gap_won_back_over_flatquant"]["holds"]
    assert found["token_types.diffusion.w4a4.ours_minus_freeact_paper"]["value"] == pytest.approx(0.375)
    assert not any("w4a4kv4" in name or "vlm" in name for name in found)


def test_a_quantized_cache_is_compared_with_full_precision_through_a_cache():
    whole, cached = (
        rows_of(flatquant=0.4, freeact_fast=0.1),
        rows_of(setting="w4a4kv4", mode="cached", flatquant=0.8, freeact_fast=0.6),
    )
    found = by_id(whole + cached)
    assert found["token_types.diffusion.w4a4.gap_won_back_over_flatquant"]["value"] == pytest.approx(0.75)
    short = found["token_types.diffusion.w4a4kv4.gap_won_back_over_flatquant"]
    assert short["value"] == pytest.approx(0.25)
    assert not short["holds"]


def test_a_seed_that_was_not_measured_does_not_count():
    rows = rows_of(flatquant=0.4, freeact_fast=[0.1, 0.3])
    rows[-1] = {**rows[-1], "value": None, "note": "the time was up"}
    assert losses(rows, "diffusion", "freeact-fast", "w4a4") == pytest.approx({0: 3.6})
    assert won_back([r for r in rows if r["method"] != "fp"], "diffusion", "freeact-fast", "w4a4") is None


def test_time_and_share_of_the_types():
    head = {"model": "diffusion", "method": "freeact", "setting": "w4a4", "seed": 0}
    copies = {
        ("1b", 1): [1.0, 1.1, 1.0, 1.3],
        ("1b", 3): [1.0, 1.1, 1.0, 9.0],
        ("8b", 1): [2.0, 2.0],
        ("8b", 3): [2.0, 2.2],
    }
    rows = [
        {**head, "metric": "seconds", "shape": shape, "tokens": 1, "types": kind, "placement": i, "value": v}
        for (shape, kind), values in copies.items()
        for i, v in enumerate(values)
    ]
    rows.append({**head, "metric": "per_type_parameter_share", "value": 0.004})
    (slowest,) = cost_claims.claims(rows)
    assert (slowest["value"], slowest["holds"]) == (
        pytest.approx(1.05),
        False,
    )  # not the one slow copy of the other size
    assert "freeact, 8b, 1 tokens" in slowest["how"]
    found = by_id(rows)
    assert "token_types.three_types_time_ratio" not in found
    assert found["token_types.per_type_parameter_share"]["holds"]


def test_copies_with_one_type_are_their_own_control():
    assert cost_claims.halves([1.0, 1.0, 1.0, 1.0]) == (1.0, 1.0)
    middle, most = cost_claims.halves([1.0, 1.0, 1.0, 1.2, 1.2, 1.2])
    assert 1.0 < middle <= most == pytest.approx(1.2)
    assert cost_claims.noise([1.0] * 4, [1.01] * 4) == 0.0
    assert cost_claims.noise([1.0, 1.1, 1.2], [1.0, 1.1, 1.3]) > 0.02


def test_settings_are_read():
    assert bits("w4a4kv4") == {"weight_bits": 4, "activation_bits": 4, "kv_bits": 4}
    with pytest.raises(ValueError, match="w4a4"):
        bits("four")
    with pytest.raises(SystemExit, match="names nothing"):
        run.main(["--tiny", "--methods", "nothing"])
