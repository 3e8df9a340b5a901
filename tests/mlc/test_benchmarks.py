"""What the benchmarks claim follows from their rows; the task cannot be won by a constant answer."""

import itertools
import json
import statistics

import pytest

from benchmarks.mlc import step_cost_claims, transfer_claims


def test_step_cost_claims_are_ratios_to_the_fastest_stock_step_of_the_run():
    rows = [
        {"variant": "stock", "metric": "seconds_per_step", "value": 3.0},
        {"variant": "stock", "metric": "seconds_per_step", "value": 2.0},
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


def test_a_step_that_something_held_up_once_does_not_count():
    from benchmarks.mlc.step_cost import summary

    rounds = [[9.0, 9.0], [1.0, 2.0], [1.0, 70.0], [50.0, 2.0]]  # the first time is kept apart
    rows = {(r["metric"], r.get("step")): r for r in summary(rounds, [3, 5, 4], 100)}
    assert rows["seconds_per_step", None]["value"] == 1.5
    assert rows["seconds_per_step", None]["rounds"] == 3
    assert rows["seconds_per_step", None]["spread"] == pytest.approx(statistics.stdev([1.5, 35.5, 26.0]))
    assert [rows["seconds_of_step", i]["value"] for i in (0, 1)] == [1.0, 2.0]
    assert rows["seconds_per_step_of_new_shapes", None]["value"] == 9.0
    assert rows["peak_bytes", None]["value"] == 105
    alone = summary(rounds[:1], [], 100)
    assert [(r["metric"], r["value"]) for r in alone] == [
        ("seconds_per_step_of_new_shapes", 9.0),
        ("peak_bytes", None),
    ]


def test_transfer_claims_are_means_over_seeds():
    numbers = {  # variance seen, held out, English accuracy, perplexity, transfer
        "aligned": [(1.0, 0.4, 0.99, 10.0, 0.80), (2.0, 0.6, 0.97, 10.0, 0.82)],
        "ours": [(0.2, 0.2, 0.98, 10.1, 0.90), (0.4, 0.2, 0.97, 10.1, 0.94)],
        "ours.shuffled-each": [(1.0, 0.4, 0.9, 10.1, 0.60), (1.0, 0.4, 0.9, 10.1, 0.62)],
        "ours.shuffled-rows": [(1.0, 0.4, 0.9, 10.1, 0.70), (1.0, 0.4, 0.9, 10.1, 0.72)],
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
    assert found["gain_over_shuffled_in_sd"] == pytest.approx(0.21 / spread)  # the lesser of the two
    one = [r for r in rows if r["method"] != "ours.shuffled-rows"]
    assert "mlc.transfer.gain_over_shuffled_in_sd" not in {c["id"] for c in transfer_claims.claims(one)}
    assert transfer_claims.claims(rows[:5]) == []
    # a stop in the middle: seeds that only one of the two has do not count
    lone = [{"method": "aligned", "seed": 2, "metric": m, "value": 99.0} for m in (*metrics, "accuracy_transfer")]
    lone.append({"method": "ours.shuffled-rows", "seed": 3, "metric": "accuracy_transfer", "value": 0.0})
    assert {c["id"].rpartition(".")[2]: c["value"] for c in transfer_claims.claims(rows + lone)} == found


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


def map_rows(numbers):
    metrics = ("variance_x100_seen", "variance_x100_validation", "accuracy_english", "perplexity_english")
    return [
        {"method": method, "seed": 100, "metric": metric, "value": value}
        for method, values in numbers.items()
        for metric, value in zip((*metrics, "accuracy_transfer"), values, strict=True)
    ]


NUMBERS = {  # variance seen, on validation languages, English accuracy, perplexity, transfer
    "base": (0.0, 0.0, 0.5, 9.5, 0.5),
    "aligned@full-1e-5-beta1": (3.0, 1.0, 0.99, 10.0, 0.8),
    "tied@full-1e-5-beta1": (0.4, 0.4, 0.99, 10.0, 0.95),
    "tied.rows@full-1e-5-beta1": (0.4, 0.4, 0.99, 10.0, 0.90),
    "repulsion@full-1e-5-beta1": (0.2, 0.2, 0.99, 10.0, 0.95),
    "repulsion.rows@full-1e-5-beta1": (0.2, 0.2, 0.99, 10.0, 0.94),
    "both-move@full-1e-5-beta1": (0.1, 0.1, 0.99, 15.0, 0.99),
    "both-move.rows@full-1e-5-beta1": (0.1, 0.1, 0.99, 15.0, 0.80),
    "contrast@full-1e-5-beta1": (0.1, 0.1, 0.80, 10.0, 0.99),
    "contrast.rows@full-1e-5-beta1": (0.1, 0.1, 0.80, 10.0, 0.80),
    "aligned@lora32-5e-4-beta1": (3.0, 1.0, 0.99, 30.0, 0.8),
    "tied@lora32-5e-4-beta1": (0.1, 0.1, 0.99, 30.0, 0.99),
    "aligned@lora32-2e-4-beta1": (3.0, 1.0, 0.70, 9.6, 0.7),
    "tied@lora32-2e-4-beta1": (0.1, 0.1, 0.70, 9.6, 0.99),
}


def test_the_map_chooses_what_comes_nearest_to_all_claims():
    from benchmarks.mlc.transfer_claims import choose, score

    rows = map_rows(NUMBERS)
    assert choose(rows) == "tied@full-1e-5-beta1"
    assert score(rows, "tied@full-1e-5-beta1") == pytest.approx(min(3 / 0.4 / 5, 1 / 0.4 / 2, 0.05 / 0.04))
    assert score(rows, "repulsion@full-1e-5-beta1") == pytest.approx(
        0.01 / 0.04
    )  # no better than shuffled translations
    assert score(rows, "both-move@full-1e-5-beta1") < 0  # ruins the text
    assert score(rows, "contrast@full-1e-5-beta1") < 2  # forgets its English
    lone = [r for r in rows if not r["method"].startswith("tied.rows")]
    assert choose(lone) == "contrast@full-1e-5-beta1"  # a variant without its control is not chosen
    with pytest.raises(ValueError, match="no variant"):
        choose(map_rows({"base": NUMBERS["base"]}))


def test_a_regime_that_ruins_english_or_does_not_learn_is_not_chosen():
    from benchmarks.mlc.transfer_claims import choose_regime

    rows = map_rows(NUMBERS)
    assert choose_regime(rows) == "full-1e-5-beta1"
    assert choose_regime([r for r in rows if not r["method"].endswith("full-1e-5-beta1")]) == "lora32-2e-4-beta1"


def test_every_method_of_the_table_and_point_of_the_map_is_a_trainer_config(tmp_path):
    from benchmarks.mlc.transfer_methods import BASE, REGIMES, VARIANTS, first_points, methods, point, second_points
    from trl_mlc.dpo import MLCDPOConfig

    regime = next(iter(REGIMES))
    found = [point(name) for name in (*first_points(), *second_points(regime)) if name != BASE]
    for variant in VARIANTS:
        table = methods(f"{variant}@{regime}")
        assert table["ours.shuffled-rows"] == {**table["ours"], "shuffled": "rows"}
        found += [settings for name, settings in table.items() if name != BASE]
    for settings in found:
        own = {k: v for k, v in settings.items() if k.startswith("mlc_") or k in ("learning_rate", "beta")}
        assert set(settings) - set(own) <= {
            *("lora", "steps", "shuffled", "embedding_rate", "warmup", "kept", "head", "taught", "concepts")
        }
        MLCDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **own)


def test_the_rule_cannot_be_won_by_a_constant_answer_and_tests_are_new():
    from benchmarks.mlc.concepts import ANSWERS, DECLINES, draw_languages, split
    from tests.conftest import asset_or_skip

    languages = draw_languages(0)
    data = split(asset_or_skip("concepts"), 0, 200, 40, languages.taught, languages.related)

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
    assert set(data.train[0]["prompt_translations"]) == set(languages.taught)
    assert set(data.test[0]["prompt_translations"]) == set(languages.related)


def test_held_out_languages_are_neither_taught_nor_those_that_settings_are_chosen_by():
    from benchmarks.mlc.concepts import DRAWN, GROUPS, OTHERS, POOL, SCORED, VALIDATION, draw_languages
    from benchmarks.mlc.transfer_run import groups

    assert len(set(POOL)) == len(POOL) == 100
    assert min(map(len, GROUPS.values())) >= 4
    choosing = draw_languages(100, validating=True)
    assert {*choosing.related, *choosing.far} == set(VALIDATION)
    drawn = [draw_languages(seed) for seed in range(5)]
    for found in (choosing, *drawn):
        assert len(found.related) + len(found.far) == DRAWN
        assert sorted([*found.taught, *found.related, *found.far]) == list(POOL)
        assert set(found.far) <= set(OTHERS.split())
    for found in drawn:
        assert not set(VALIDATION) & {*found.related, *found.far}
        for names in GROUPS.values():
            held_out = set(names) & set(found.related)
            assert 1 <= len(held_out) <= len(names) / 3
            assert len(set(names) & set(found.taught)) >= 3
    assert len({found.related for found in drawn}) == 5
    assert draw_languages(3) == drawn[3]
    scored = groups(3, validating=False)
    assert scored["seen"] == ("en", *drawn[3].taught[:SCORED])
    assert (scored["held_out"], scored["held_out_far"]) == (drawn[3].related, drawn[3].far)
    assert set(scored["held_out_all"]) == {*drawn[3].related, *drawn[3].far}
    assert set(groups(100, validating=True)) == {"seen", "validation", "validation_far", "validation_all"}


def test_regimes_then_the_table_then_the_rest_of_the_map(tmp_path, monkeypatch):
    import sys

    from benchmarks.mlc import transfer

    metrics = ("variance_x100_seen", "variance_x100_validation", "variance_x100_held_out", "accuracy_english")
    metrics += ("perplexity_english", "accuracy_transfer")
    order, tries = [], {}

    def perform(self, job, gpu):
        name, seed = job
        order.append((self.mapping, name, seed))
        tries[job] = tries.get(job, 0) + 1
        if job == ("ours", 1) and tries[job] == 1:
            self.take(job, {"error": "out of memory"})
            return
        better = name.startswith(("ours", "tied")) and not any(c in name for c in (".rows", ".each", ".shuffled"))
        numbers = (0.1, 0.2, 0.2, 1.0, 10.0, 0.95) if better else (1.0, 1.0, 1.0, 1.0, 10.0, 0.9)
        if "lora32-2e-4-beta1" in name and better:
            numbers = (0.05, 0.1, 0.1, 1.0, 10.0, 0.99)
        rows = [{"method": name, "seed": seed, "metric": m, "value": v} for m, v in zip(metrics, numbers, strict=True)]
        self.take(job, rows)

    monkeypatch.setattr(transfer.Pool, "perform", perform)
    rows, points = tmp_path / "table.jsonl", tmp_path / "map.jsonl"
    line = ["transfer.py", "--first", "regimes", "--seeds", "0", "1", "--rows", str(rows), "--map-rows", str(points)]
    monkeypatch.setattr(sys, "argv", [*line, "--folder", str(tmp_path), "--gpus", "0"])
    transfer.main()
    assert [mapping for mapping, _ in itertools.groupby(order, key=lambda job: job[0])] == [True, False, True]
    table = [(name, seed) for mapping, name, seed in order if not mapping]
    claimed = ["aligned", "ours", "ours.shuffled-each", "ours.shuffled-rows"]
    assert table[:8] == [(name, seed) for seed in (0, 1) for name in claimed]
    assert table.count(("ours", 1)) == 2  # failed once
    assert any(name == "plain@lora32-2e-4-beta1" for mapping, name, _ in order if mapping)
    written = json.loads((tmp_path / "mlc_transfer.json").read_text())
    assert {c["id"]: c["value"] for c in written["claims"]}["mlc.transfer.variance_cut_held_out"] == pytest.approx(5)
    assert json.loads((tmp_path / "mlc_transfer_map.json").read_text())["claims"] == []
    before = len(order)
    transfer.main()  # everything is there already
    assert len(order) == before
    guard = "plain,repulsion@words-1e-3-beta1"
    more = ["--ours", "tied@lora32-2e-4-beta1", "--then", guard]
    monkeypatch.setattr(sys, "argv", [*line[:1], *line[3:], "--folder", str(tmp_path), "--gpus", "0", *more])
    transfer.main()
    assert order[before:] == [(True, guard, 100)]


@pytest.mark.filterwarnings("ignore")
def test_regimes_keep_the_head_the_words_or_half_the_way(tied, tokenizer):
    import argparse

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from benchmarks.mlc.transfer_run import train
    from tests.mlc.conftest import rows

    options, data = argparse.Namespace(steps=2, batch=2, tiny=False), Dataset.from_dict(rows())
    first = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)

    def moved(settings: dict) -> dict[str, torch.Tensor]:
        own = {"learning_rate": 1e-2, "mlc_layer": 3, "mlc_extractor_dim": 0, "mlc_every": 1, **settings}
        model, layer, numbers, _ = train(tied, tokenizer, data, own, 0, options, own.pop("kept", 0.0))
        assert layer == 3
        assert numbers["train_seconds"] > 0
        parts = {
            "words": lambda m: m.get_input_embeddings().weight,
            "head": lambda m: m.get_output_embeddings().weight,
            "body": lambda m: m.model.layers[0].mlp.up_proj.weight,
        }
        return {name: part(model).detach() - part(first).detach() for name, part in parts.items()}

    found = moved({"head": "frozen", "embedding_rate": 1e-1})
    assert not found["head"].any()
    assert found["words"].abs().max() > 5 * found["body"].abs().max() > 0
    found = moved({"embedding_rate": 0.0})
    assert not found["words"].any()
    assert found["body"].any()
    for adapters in (0, 4):
        whole, half = (moved({"lora": adapters, "kept": kept})["body"] for kept in (0.0, 0.5))
        assert whole.any()
        assert torch.allclose(half, whole / 2, atol=1e-6)


def test_one_training_is_scored_at_several_ways_back(tied):
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.mlc.transfer_run import sweep
    from trl_mlc.embedding import untie_head

    first = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    untie_head(trained)
    with torch.no_grad():
        for value in trained.parameters():
            value += 1.0
    parts = {
        "words": lambda m: m.get_input_embeddings().weight,
        "head": lambda m: m.get_output_embeddings().weight,
        "body": lambda m: m.model.layers[0].mlp.up_proj.weight,
    }
    found = {}

    def measured(name: str) -> list[dict]:
        found[name] = [(part(trained) - part(first)).mean().item() for part in parts.values()]
        return [{"method": name}]

    rows = sweep(trained, tied, [0.0, 0.25, 0.75], measured, "ours")
    assert [row["method"] for row in rows] == ["ours", "ours-kept0.25", "ours-kept0.75"]
    for name, left in zip(found, (1.0, 0.75, 0.25), strict=True):
        assert found[name] == pytest.approx([left] * 3, abs=1e-5)
