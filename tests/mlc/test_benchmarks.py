"""What the benchmarks claim follows from their rows; the task cannot be won by a constant answer."""

import statistics

import pytest

from benchmarks.mlc import step_cost_claims, transfer_claims


def test_step_cost_claims_are_ratios_to_the_stock_step_of_the_run():
    rows = [
        {"variant": "stock", "metric": "seconds_per_step", "value": 1.0},
        {"variant": "stock", "metric": "seconds_per_step", "value": 3.0},
        {"variant": "default", "metric": "seconds_per_step", "value": 3.0},
        {"variant": "three-languages", "metric": "seconds_per_step", "value": 2.6},
        {"variant": "stock", "metric": "peak_bytes", "value": None, "note": "no GPU"},
        {"variant": "default", "metric": "peak_bytes", "value": None, "note": "no GPU"},
    ]
    found = {c["id"]: c for c in step_cost_claims.claims(rows)}
    assert found["mlc.step_cost.default"]["value"] == pytest.approx(1.5)
    assert found["mlc.step_cost.default"]["holds"]
    assert not found["mlc.step_cost.three_languages"]["holds"]
    assert "mlc.peak_memory" not in found


def test_transfer_claims_are_means_over_seeds():
    numbers = {  # variance seen, held out, English accuracy, perplexity, transfer
        "aligned": [(1.0, 0.4, 0.99, 10.0, 0.80), (2.0, 0.6, 0.97, 10.0, 0.82)],
        "ours": [(0.2, 0.2, 0.98, 10.1, 0.90), (0.4, 0.2, 0.97, 10.1, 0.94)],
        "ours.shuffled": [(1.0, 0.4, 0.9, 10.1, 0.70), (1.0, 0.4, 0.9, 10.1, 0.72)],
    }
    metrics = ("variance_x100_seen", "variance_x100_held_out", "accuracy_english", "perplexity_english")
    rows = [
        {"method": method, "seed": seed, "metric": metric, "value": value}
        for method, seeds in numbers.items()
        for seed, values in enumerate(seeds)
        for metric, value in zip((*metrics, "accuracy_transfer"), values, strict=True)
    ]
    rows.append({"method": "aligned", "seed": 0, "metric": "accuracy_english", "value": 0.0, "language": "en"})
    found = {c["id"].rpartition(".")[2]: c["value"] for c in transfer_claims.claims(rows)}
    assert found["variance_cut_seen"] == pytest.approx(5.0)
    assert found["variance_cut_held_out"] == pytest.approx(2.5)
    assert found["english_accuracy_drop"] == pytest.approx(0.005)
    assert found["english_perplexity_ratio"] == pytest.approx(1.01)
    spread = ((statistics.variance([0.90, 0.94]) + statistics.variance([0.70, 0.72])) / 2) ** 0.5
    assert found["gain_over_shuffled_in_sd"] == pytest.approx(0.21 / spread)
    assert transfer_claims.claims(rows[:5]) == []


def test_a_diverged_seed_of_the_aligned_run_does_not_buy_the_perplexity_claim():
    perplexity = {"aligned": (10.0, 30_000.0, 10.0), "ours": (11.0, 11.0, 11.0)}
    rows = [
        {"method": method, "seed": seed, "metric": metric, "value": value if metric == "perplexity_english" else 1.0}
        for method, seeds in perplexity.items()
        for seed, value in enumerate(seeds)
        for metric in ("perplexity_english", "variance_x100_seen", "variance_x100_held_out", "accuracy_english")
    ]
    found = {c["id"]: c for c in transfer_claims.claims(rows)}["mlc.transfer.english_perplexity_ratio"]
    assert found["value"] == pytest.approx(1.1)
    assert not found["holds"]


def test_the_map_chooses_what_comes_nearest_to_all_claims():
    from benchmarks.mlc.transfer_claims import choose

    numbers = {  # variance seen, held out, English accuracy, perplexity, loss
        "aligned": (3.0, 1.0, 0.99, 10.0, 0.1),
        "base": (0.0, 0.0, 1.0, 5.0, 0.0),
        "wide": (1.0, 0.9, 0.99, 10.0, 0.1),
        "good": (0.4, 0.4, 0.99, 10.0, 0.1),
        "ruins-the-text": (0.1, 0.1, 0.99, 15.0, 0.1),
        "forgets-english": (0.1, 0.1, 0.80, 10.0, 0.1),
        "aligned,rate=0.1": (3.0, 1.0, 0.99, 20.0, 0.1),
        "good,rate=0.1": (0.3, 0.2, 0.99, 20.0, 0.1),
    }
    metrics = ("variance_x100_seen", "variance_x100_held_out", "accuracy_english", "perplexity_english", "loss last")
    rows = [
        {"method": method, "seed": 100, "metric": metric, "value": value}
        for method, values in numbers.items()
        for metric, value in zip(metrics, values, strict=True)
    ]
    assert choose(rows, list(numbers)) == "good,rate=0.1"
    assert choose([r for r in rows if r["method"] != "aligned,rate=0.1"], list(numbers)) == "good"
    with pytest.raises(ValueError, match="no candidate"):
        choose(rows[:5], list(numbers))


def test_the_rule_cannot_be_won_by_a_constant_answer_and_tests_are_new():
    from benchmarks.mlc.concepts import ANSWERS, DECLINES, SEEN, TEST_LANGUAGES, split
    from tests.conftest import asset_or_skip

    data = split(asset_or_skip("concepts"), train=200, test=40)

    def pairs(rows):
        return {frozenset(prompt.removesuffix("\nAnswer:").split(", ")) for prompt in rows["prompt"]}

    def words(rows):
        return set().union(*pairs(rows))

    assert not pairs(data.train) & pairs(data.test)
    assert not words(data.train) & words(data.new_words)
    for rows in data:
        declined = [row["chosen"] in DECLINES for row in rows]
        assert statistics.fmean(declined) == pytest.approx(0.5, abs=0.01)
        for row in rows:
            assert (row["chosen"] in DECLINES) != (row["rejected"] in DECLINES)
            assert {row["chosen"], row["rejected"]} <= {*DECLINES, *ANSWERS}
    assert set(data.train[0]["prompt_translations"]) == set(SEEN)
    assert set(data.test[0]["prompt_translations"]) == set(TEST_LANGUAGES)
