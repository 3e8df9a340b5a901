"""The accuracy benchmark in miniature: runs whole, in processes, up to a limit, with a quantized cache."""

import math

import pytest
import torch

from benchmarks.accuracy import cache, run, runner
from benchmarks.accuracy.claims import excess, expected
from benchmarks.accuracy.jobs import SLICES
from benchmarks.accuracy.plan import QUAROTS
from tests.helpers.tiny_models import tiny
from tools.result_files import problems, read
from tools.results import MARK, table


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def commit(monkeypatch):
    monkeypatch.setenv("CONCORD_COMMIT", COMMIT)


def tiny_run(folder, *more):
    return run.main(["--tiny", "--out", str(folder), "--rows", str(folder / "rows.jsonl"), *more])


def test_miniature_end_to_end(commit, tmp_path, capsys):
    methods = ",".join(("freeact,freeact-fast,freeact-learned,flatquant,quarot", *QUAROTS))
    assert tiny_run(tmp_path, "--only", methods, "--schemes", "w4a16,w4a4,w4a4kv4") == 0
    document = read(tmp_path / "accuracy.json")
    assert problems(document) == []
    assert [entry["id"] for entry in document["claims"]] == expected(["tiny"])
    rows = document["rows"]
    full = {row["text"]: row["value"] for row in rows if row["method"] == "fp"}
    assert set(full) == set(SLICES)
    for method in methods.split(","):
        assert excess(rows, "tiny", method, "w4a4")[0] > 0
    sizes = {row["method"]: row["value"] for row in rows if row["metric"] == "size_ratio"}
    assert all(
        0.25 < value < 1 for value in sizes.values()
    )  # above four bits; here transforms weigh as much as weights
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].split()[:1] in (["pass"], ["falls"])
    # a second run repeats nothing and gives the same rows
    assert tiny_run(tmp_path, "--only", methods, "--schemes", "w4a16,w4a4,w4a4kv4", "--limit-seconds", "0") == 0
    assert read(tmp_path / "accuracy.json")["rows"] == rows


def test_methods_that_a_change_does_not_touch_may_come_from_an_earlier_commit(commit, tmp_path, monkeypatch):
    assert tiny_run(tmp_path, "--only", "rtn,quarot", "--schemes", "w4a4") == 0
    before = read(tmp_path / "accuracy.json")["rows"]
    monkeypatch.setenv("CONCORD_COMMIT", "f" * 40)
    words = ["--tiny", "--out", str(tmp_path / "new"), "--rows", str(tmp_path / "new.jsonl"), "--schemes", "w4a4"]
    words += ["--only", "rtn,quarot", "--earlier", str(tmp_path / "rows.jsonl"), "--earlier-methods", "fp,quarot"]
    assert run.main([*words, "--limit-seconds", "0"]) == 1  # nothing is run: round to nearest is missing
    document = read(tmp_path / "new" / "accuracy.json")
    assert document["commit"] == "f" * 40
    for row in document["rows"]:
        if row["metric"] in ("nll", "size_ratio"):
            assert (row["value"] is None) == (row["method"] == "rtn")
            assert ("measured at 0123456789" in row["note"]) == (row["method"] != "rtn")
    values = {(r["method"], r["metric"], r.get("text")): r["value"] for r in before}
    kept = [row for row in document["rows"] if row["method"] == "quarot"]
    assert len(kept) > 3
    assert all(values[row["method"], row["metric"], row.get("text")] == row["value"] for row in kept)


def test_a_failing_job_is_listed_and_the_rest_is_written(commit, tmp_path, monkeypatch, capsys):
    whole = runner.perform

    def failing(job):
        if job.method == "quarot":
            raise RuntimeError("no memory in /some/where/deep.py")
        return whole(job)

    monkeypatch.setattr(runner, "perform", failing)
    assert tiny_run(tmp_path, "--only", "rtn,quarot", "--schemes", "w4a4") == 1
    document = read(tmp_path / "accuracy.json")
    assert problems(document) == []
    lost = [row for row in document["rows"] if row["method"] == "quarot"]
    assert [row["value"] for row in lost] == [None, None]
    assert lost[0]["note"] == "RuntimeError: no memory in deep.py"
    assert any(row["method"] == "rtn" and row["value"] for row in document["rows"])
    # assembled again without time to run anything, the reason is still there
    assert tiny_run(tmp_path, "--only", "rtn,quarot", "--schemes", "w4a4", "--limit-seconds", "0") == 1
    assert read(tmp_path / "accuracy.json")["rows"] == document["rows"]
    assert "not measured: tiny quarot w4a4" in capsys.readouterr().out


def test_no_job_is_started_after_the_limit(commit, tmp_path, capsys):
    assert tiny_run(tmp_path, "--only", "rtn", "--schemes", "w4a4", "--limit-seconds", "0") == 1
    assert not (tmp_path / "accuracy.json").exists()
    assert "not started: the time limit" in capsys.readouterr().out


def test_cost_alone_scores_nothing(commit, tmp_path):
    assert tiny_run(tmp_path, "--cpu-cost") == 0
    rows = read(tmp_path / "accuracy_cpu.json")["rows"]
    assert {row["group"] for row in rows} == {"cpu_cost"}
    assert [row["metric"] for row in rows] == ["calibration_seconds", "peak_gb", "size_ratio"]


@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own(commit, tmp_path):
    assert tiny_run(tmp_path, "--only", "rtn", "--schemes", "w4a4", "--jobs", "1", "--stop-seconds", "300") == 0
    rows = read(tmp_path / "accuracy.json")["rows"]
    [peak] = [row for row in rows if row["metric"] == "peak_gb"]
    assert 0.05 < peak["value"] < 5
    assert "VmHWM" in peak["note"] or "getrusage" in peak["note"]


def test_the_cache_does_not_change_the_weights():
    """What lets W4A4 and W4A4KV4 share a calibration."""
    from optimum_freeact import FreeActConfig, FreeActInput, FreeActLinear, quantize
    from tests.helpers.tiny_models import sample_ids

    states = []
    for kv_bits in (16, 4):
        settings = {"n_samples": 4, "seq_len": 16, "batch_size": 2, "progress": False, "calibration_device": "cpu"}
        config = FreeActConfig(kv_bits=kv_bits, dataset=sample_ids(4, 16), **settings)
        modules = quantize(tiny("llama"), config).named_modules()
        quantized = {name: module for name, module in modules if isinstance(module, (FreeActInput, FreeActLinear))}
        states.append({f"{n}.{key}": t for n, module in quantized.items() for key, t in module.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 20
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_marks_of_the_page_can_be_filled(commit, tmp_path):
    """The page's tables name rows that a run makes."""
    methods = "preset,freeact rounding=rtn"
    assert tiny_run(tmp_path, "--only", methods, "--schemes", "w4a16,w4a4") == 0
    document = read(tmp_path / "accuracy.json")
    page = (run.result_files.ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    marks = [match["query"].split() for match in MARK.finditer(page.replace("<!-- pending results:", "<!-- results:"))]
    assert len(marks) >= 8
    for name, *options in marks:
        if name == "accuracy" and "group=peer" not in options and "value" not in options:  # those name a real model
            assert table(document, options).count("|") > 6


@pytest.mark.parametrize("weights", ["full", "w4a4"])
def test_caches_are_compared_sequence_by_sequence(weights, tmp_path):
    models, texts = run.tiny_world(tmp_path)
    options = cache.parser().parse_args(["--windows", "2", "--window", "32", "--samples", "8"])
    rows = [row for found in cache.measure(options, "tiny", models["tiny"], texts[0], weights) for row in found]
    assert len(rows) == 3 * 2 * len(cache.CACHES)
    value = {(row["cache"], row["sequence"], row["metric"]): row["value"] for row in rows}
    for index in range(2):
        if weights == "full":
            assert abs(value["16 bits", index, "divergence"]) < 1e-6
            assert value["rotated, means", index, "divergence"] > 1e-6
        assert value["rotated, means", index, "divergence"] != value["means", index, "divergence"]
        assert value["rotated", index, "divergence"] != value["rotated, means", index, "divergence"]


def test_a_cache_that_tells_the_same_words_with_other_chances_is_apart():
    truth = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
    told = truth.clone()
    told[1] = torch.tensor([0.2, 0.2, 0.6]).log()
    found = cache.scores(told, truth, torch.tensor([0, 1, 2, 0]))
    apart = 0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)
    assert found["divergence"] == pytest.approx(apart / 3, rel=1e-5)
    assert found["median_divergence"] == 0
    assert found["excess_nll"] == pytest.approx(math.log(0.8 / 0.6) / 3, rel=1e-5)


def test_sequences_are_summed_up_and_counted():
    shared = {"model": "m", "text": "t", "weights": "full", "metric": "divergence"}
    values = {"means": (1.0, 2.0, 3.0), "rotated, means": (0.5, 2.5, 1.5)}
    rows = [
        {**shared, "cache": name, "sequence": index, "value": value}
        for name, three in values.items()
        for index, value in enumerate(three)
    ]
    found = {(row["cache"], row["metric"]): row["value"] for row in cache.summary(rows)}
    assert found == {
        ("means", "divergence"): 2.0,
        ("rotated, means", "divergence"): 1.5,
        ("rotated, means", "nearer_sequences"): 2,
        ("rotated, means", "divergence_over_means"): 0.75,
    }
