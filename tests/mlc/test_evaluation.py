"""Metrics on answers known by hand, the whole report on a tiny model."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.mlc.conftest import rows
from trl_mlc.evaluation.geometry import centred_units, cross_prompt_cosine, language_geometry, retrieval_at_1
from trl_mlc.evaluation.preferences import (
    accuracies,
    anchor_agreement,
    completion_log_probs,
    pairwise_agreement,
    perplexity,
    variance_x100,
)
from trl_mlc.evaluation.report import EvaluationReport, evaluate_model, tokenized_pair
from trl_mlc.scan import best_layer, complete_groups, scan_layers


PAPER_VARIANCES = {  # printed in Table 1 for the raw model, DPO, MPO and DPO with MLC
    (93.3, 96.1, 93.3, 92.2, 93.9, 53.3, 6.1, 33.9, 21.1, 12.2): 13.14,
    (99.4, 98.3, 97.2, 97.8, 96.1, 70.6, 7.2, 50.6, 30.0, 17.2): 12.44,
    (81.1, 81.7, 82.2, 77.2, 78.3, 77.2, 4.4, 70.6, 59.4, 42.8): 5.53,
    (99.4, 96.7, 97.8, 98.3, 98.3, 95.0, 92.8, 92.8, 91.1, 97.2): 0.07,
}


@pytest.mark.parametrize(("rates", "printed"), list(PAPER_VARIANCES.items()))
def test_variance_is_the_papers(rates, printed):
    assert variance_x100(torch.tensor(rates) / 100) == pytest.approx(printed, abs=0.015)


def test_accuracy_and_agreement_by_hand():
    margins = torch.tensor([[2.0, 1.0, -1.0], [1.0, -1.0, -2.0], [-1.0, -3.0, 4.0], [1.0, 0.0, 9.0]])
    present = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    assert accuracies(margins, present).tolist() == pytest.approx([3 / 4, 1.5 / 4, 1 / 3])
    assert anchor_agreement(margins, present, 0).tolist() == pytest.approx([1.0, 2 / 4, 0.0])
    assert pairwise_agreement(margins, present) == pytest.approx((2 / 4 + 0.0 + 1 / 3) / 3)


def test_retrieval_finds_permutations_and_centring_removes_the_language():
    states = torch.randn(20, 8)
    offset = 50 * torch.randn(8)
    assert retrieval_at_1(centred_units(states), centred_units(states + offset)) == 1.0
    assert retrieval_at_1(centred_units(states), centred_units(states.roll(1, 0))) == 0.0
    found = language_geometry({"en": states, "sw": states + offset}, "en")
    assert found["sw"]["centred_cosine"] == pytest.approx(1.0)
    assert found["sw"]["cross_prompt_cosine"] > 0.9 > found["en"]["cross_prompt_cosine"]
    assert cross_prompt_cosine(torch.ones(4, 3)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"'xx' is not one of the languages \['en', 'sw'\]"):
        language_geometry({"en": states, "sw": states}, "xx")


def test_log_probs_do_not_depend_on_batching(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    texts = [("say cat", " yes"), ("say", " never again"), ("a much longer prompt than that", " no")]
    pairs = [tokenized_pair(tokenizer, p, c, {}) for p, c in texts]
    assert tokenizer.decode(pairs[0][1]) == " yes<|end|>"
    together = completion_log_probs(model, pairs, batch_size=3)
    for i, (prompt, completion) in enumerate(pairs):
        ids = torch.tensor([prompt + completion])
        scores = torch.log_softmax(model(ids).logits[0].double(), -1)
        by_hand = sum(scores[len(prompt) - 1 + j, token].item() for j, token in enumerate(completion))
        assert together[i].item() == pytest.approx(by_hand, abs=1e-4)
        alone = completion_log_probs(model, [pairs[i]])
        assert together[i].item() == pytest.approx(alone.item(), abs=1e-4)


def test_perplexity_is_the_models_loss(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ids = tokenizer(text="the cat sat on the mat")["input_ids"]
    expected = math.exp(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item())
    assert perplexity(model, [ids]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("conversational", [False, True])
def test_report_of_a_tiny_model(conversational, tiny, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    table = rows(n=6, conversational=conversational, missing=4)
    data = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    report = evaluate_model(model, tokenizer, data, layer=3)
    assert list(report.languages) == ["en", "ar", "bn", "sw"]
    assert report.languages["bn"]["prompts"] == 4
    assert report.languages["en"]["agreement"] == 1.0
    assert {"accuracy", "margin", "retrieval_at_1", "cross_prompt_cosine", "perplexity"} <= report.languages[
        "sw"
    ].keys()
    report.save(tmp_path / "report.json")
    assert EvaluationReport.load(tmp_path / "report.json") == report
    assert "accuracy_variance_x100" in report.table()
    assert model.training is False
    only_prompts = [{k: v for k, v in row.items() if k not in ("chosen", "rejected")} for row in data]
    assert "accuracy" not in evaluate_model(model, tokenizer, only_prompts, layer=3).languages["en"]
    with pytest.raises(ValueError, match=r"languages \['xx'\] are in none"):
        evaluate_model(model, tokenizer, data, languages=["xx"])


def test_rows_without_a_pair_are_said_where_others_have_one(tiny, tokenizer, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    row = {"prompt": "say cat", "prompt_translations": {"sw": "sema cat"}}
    for more, said in (
        ([{}], []),
        ([{"chosen": " yes"}], ["1 of 1 rows"]),
        ([{"chosen": " yes", "rejected": " no"}, {"chosen": " yes", "rejected": None}], ["1 of 2 rows"]),
        ([{"chosen": " yes", "rejected": " no"}], []),
    ):
        caplog.clear()
        report = evaluate_model(model, tokenizer, [{**row, **columns} for columns in more])
        assert [r.message[:11] for r in caplog.records] == said
        assert ("accuracy" in report.languages["en"]) == ("rejected" in more[0] and not said)


def test_a_table_beside_an_earlier_report_shows_both():
    before = EvaluationReport({"en": {"prompts": 4, "accuracy": 0.5}}, {"mean_accuracy": 0.5})
    after = EvaluationReport({"en": {"prompts": 4, "accuracy": 1.0}, "sw": {"prompts": 4}}, {"mean_accuracy": 1.0})
    lines = after.table(before).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["language", "prompts", "accuracy"],
        ["en", "4", "0.500", "->", "1.000"],
        ["sw", "4", "-"],
    ]
    assert lines[3] == "mean_accuracy: 0.5000 -> 1.0000"
    assert len({len(line) for line in lines[:3]}) == 1
    assert "->" not in after.table()


def test_scan_prefers_the_layer_that_retrieves(tokenizer, tiny):
    decoder = AutoModelForCausalLM.from_pretrained(tiny).model
    groups = [[[5 + n, 6, 7 + n], [5 + n, 6, 7 + n], [9, 8 + n, 7]] for n in range(5)]
    scores = scan_layers(decoder, groups)
    assert [(s.layer, s.pooling) for s in scores] == [(i, p) for p in ("last", "mean") for i in range(1, 5)]
    assert all(s.retrieval >= 0.5 for s in scores), "the second language is a copy of the first"
    assert all(s.spectrum[0] == 1.0 and len(s.spectrum) == 3 for s in scores)
    fake = [s._replace(retrieval=0.9 if s.layer == 2 else 0.1) for s in scores]
    assert best_layer(fake).layer == 2
    with pytest.raises(ValueError, match="at least two prompts"):
        scan_layers(decoder, groups[:1])


def test_scan_uses_the_largest_block_without_gaps():
    def row(**languages):
        return {"mlc_language_ids": [int(k[1:]) for k in languages], "mlc_input_ids": list(languages.values())}

    table = [row(l0=[1], l1=[2], l2=[3]), row(l0=[4], l1=[5]), row(l0=[6], l1=[7]), row(l0=[8], l2=[9]), row(l1=[1])]
    assert complete_groups(table, 10) == [[[1], [2]], [[4], [5]], [[6], [7]]]
    assert complete_groups(table, 1) == [[[1], [2], [3]]]


def test_figures_are_drawn_from_reports(tiny, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    from trl_mlc.plots import TITLES, plot_languages, plot_layers

    before = EvaluationReport({"en": {"accuracy": 0.9}, "sw": {"accuracy": 0.4}}, {})
    after = EvaluationReport({"en": {"accuracy": 0.9}, "sw": {"accuracy": 0.8}}, {})
    plot_languages(before, after, tmp_path / "languages.png")
    decoder = AutoModelForCausalLM.from_pretrained(tiny).model
    plot_layers(scan_layers(decoder, [[[5 + n, 6], [9, n]] for n in range(4)], ["last"]), tmp_path / "layers.svg")
    assert (tmp_path / "languages.png").read_bytes()[:4] == b"\x89PNG"
    all_metrics = EvaluationReport({"en": dict.fromkeys(TITLES, 0.5), "sw": dict.fromkeys(TITLES, 0.4)}, {})
    plot_languages(all_metrics, all_metrics, tmp_path / "all.svg")
    (width, height) = (
        float(n)
        for n in re.search(r'width="([0-9.]+)pt" height="([0-9.]+)pt"', (tmp_path / "all.svg").read_text()).groups()
    )
    assert width < 4 * height  # seven panels in two rows
    assert "</svg>" in (tmp_path / "layers.svg").read_text()
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_languages(before, EvaluationReport({"fr": {}}, {}), tmp_path / "none.png")


def test_importing_the_package_is_light():
    code = (
        "import sys, trl_mlc; assert not {'torch', 'trl', 'datasets', 'transformers'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    names = subprocess.run(
        [sys.executable, "-c", "import trl_mlc, json; print(json.dumps(trl_mlc.__all__))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    import trl_mlc

    for name in json.loads(names):
        assert getattr(trl_mlc, name).__name__ == name
