"""The accuracy benchmark: claims follow from rows, no text is calibrated and scored on, and a miniature runs whole."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.accuracy import cache, perform, run, runner, scoring
from benchmarks.accuracy.claims import QUALITY, claims, excess, expected
from benchmarks.accuracy.jobs import SLICES, Job, Text, absent, bits
from benchmarks.accuracy.plan import CLAIMED, GRIDS, OF_OTHERS, QUAROTS, VARIANTS, Plan
from optimum_freeact import score_text
from optimum_freeact.config_fields import DEFAULTS
from optimum_freeact.presets import PRESETS
from tests.helpers.tiny_models import tiny
from tools.result_files import problems, read
from tools.results import MARK, table


COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- claims ------------------------------------------------------------------------------------------------------


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


# --- texts and jobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLICES)
def test_calibration_and_evaluation_read_different_characters(name, tmp_path):
    calibration, evaluation = SLICES[name]
    path = tmp_path / "text.txt"
    # each character says which block of 1000 it comes from
    path.write_text("".join(chr(0x4E00 + i) * 1000 for i in range(evaluation // 1000 + 50)), encoding="utf-8")
    text = Text(name, str(path), calibration, evaluation)
    seen, held_out = set(text.read_calibration()), set(text.read_evaluation(10_000))
    assert len(text.read_calibration()) == calibration[1] - calibration[0]
    assert held_out
    assert not seen & held_out


@pytest.mark.parametrize("calibration", [(0, 101), (100, 100), (-1, 50)])
def test_overlapping_ranges_are_refused(calibration):
    with pytest.raises(ValueError, match="must not overlap"):
        Text("a", "a.txt", calibration, 100)


def test_settings_are_read_and_others_refused():
    assert bits("w4a8") == {"weight_bits": 4, "activation_bits": 8, "kv_bits": 16}
    assert bits("w4a4kv4")["kv_bits"] == 4
    with pytest.raises(ValueError, match="w4a16"):
        bits("4-bit")


def a_plan(**changes):
    text = Text("handbook", "/elsewhere/text.txt", (0, 10), 20)
    common = {"model": "tiny", "model_path": "/elsewhere/model", "texts": (text,)}
    learned = {"quantize": {"epochs": 2}, "measure": {"n_samples": 3}}
    settings = {
        "schemes": ("w4a16", "w4a8", "w4a4", "w4a4kv4"),
        "seeds": [0, 1],
        "measure": {"windows": 5, "window": 8},
    }
    return Plan(**{"common": common, **settings, "learned": learned, **changes})


def test_every_preset_is_planned_at_every_scheme_and_the_claimed_ones_with_every_seed():
    plan = a_plan()
    plan.presets()
    planned = {(job.method, setting, job.seed) for job in plan.jobs for setting in job.settings}
    methods = ("smoothquant", "quarot", "flatquant", "freeact-paper", "freeact", "freeact-fast", "freeact-learned")
    assert planned >= {(m, s, 0) for m in methods for s in plan.schemes}
    assert planned >= {(m, s, 1) for m in CLAIMED for s in ("w4a4", "w4a4kv4")}
    plan.quarots([64])
    several = {job.method for job in plan.jobs if job.seed == 1}
    assert several == {name for _, ours, theirs, _ in QUALITY for name in (ours, *theirs)}
    learned = next(job for job in plan.jobs if job.method == "freeact-learned")
    assert (learned.quantize["epochs"], learned.measure["n_samples"]) == (2, 3)


def test_ablations_change_one_field_and_skip_what_does_not_divide():
    plan = a_plan()
    plan.ablations([576, 1536])
    others = {job.method for job in plan.jobs if job.quantize["preset"] != "freeact"}
    assert others == {f"{preset} {name}={value}" for preset, name, value in OF_OTHERS}
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    changed = [set(job.quantize) - {"preset"} for job in plan.jobs if job.group == "ablation"]
    assert all(len(fields) == 1 for fields in changed)
    assert {"weight_group_size"} in changed
    narrow = a_plan()
    narrow.ablations([576, 1500])
    assert len(narrow.jobs) == len(plan.jobs) - 4  # groups of 64 and of 16, of weights and of activations


def test_quarot_is_compared_as_published_strengthened_and_on_the_same_grids():
    plan = a_plan()
    plan.quarots([576, 1536])
    by_method = {job.method: job.quantize for job in plan.jobs if job.seed == 1}
    rivals = {name for _, _, theirs, _ in QUALITY for name in theirs} - {"quarot", "flatquant"}
    assert set(by_method) == rivals
    ours = {**DEFAULTS, **PRESETS["freeact"]}
    for name in ("weight_group_size", "activation_group_size"):
        assert {by_method[method].get(name) for method in by_method if "groups" in method} == {ours[name]}
        assert {by_method[method].get(name) for method in by_method if "groups" not in method} == {None}
    narrow = a_plan()
    narrow.quarots([576, 1500])
    assert not [job for job in narrow.jobs if "groups" in job.method]


def test_learned_methods_may_be_left_to_some_schemes():
    plan = a_plan(learned_schemes=("w4a4", "w4a4kv4"))
    plan.presets()
    learned = {setting for job in plan.jobs if job.is_learned for setting in job.settings}
    assert learned == {"w4a4", "w4a4kv4"}
    assert {"w4a16", "w4a8"} <= {setting for job in plan.jobs if not job.is_learned for setting in job.settings}
    assert {job.method for job in plan.jobs if job.is_learned} == {"flatquant", "freeact-paper", "freeact-learned"}


def test_learned_methods_may_take_fewer_samples_where_nothing_is_claimed():
    plan = a_plan(learned={"quantize": {}, "measure": {"n_samples": 32}, "elsewhere": {"n_samples": 16}})
    plan.presets()
    taken = {(job.settings[-1], job.measure["n_samples"], job.note) for job in plan.jobs if job.is_learned}
    few = "learned on 16 samples"
    assert taken == {("w4a4", 32, "learned on 32 samples"), ("w4a16", 16, few), ("w4a8", 16, few)}


def test_more_seeds_of_the_default_and_of_quarot_come_after_what_claims_need():
    plan = a_plan(later_seeds=(3, 4))
    plan.presets()
    plan.quarots([64])
    later = [job for job in plan.jobs if job.seed > 1]
    assert {job.method for job in later} == {"freeact", "quarot", *QUAROTS}
    assert len(later) == 2 * (2 + len(QUAROTS))
    assert min(job.rank for job in later) > max(job.rank for job in plan.jobs if job.seed <= 1)


@pytest.mark.parametrize("name", SLICES)
def test_variants_are_scored_between_what_is_calibrated_on_and_what_is_evaluated(name, tmp_path):
    calibration, evaluation = SLICES[name]
    text = Text(name, str(tmp_path / "text.txt"), calibration, evaluation).for_choosing()
    assert calibration[1] <= text.evaluation
    needed = 24 * 1024 * 4.5  # characters of the windows
    assert text.evaluation + needed < evaluation
    plan = a_plan(common={"model": "tiny", "model_path": "/m", "texts": (Text(name, "/t", calibration, evaluation),)})
    plan.variants()
    assert {job.texts[0].evaluation for job in plan.jobs} == {text.evaluation}
    assert plan.jobs[0].group == "full"
    assert {job.method for job in plan.jobs[1:]} == {name for name, *_ in VARIANTS}


def test_scores_are_those_of_whole_logits_window_by_window():
    model, other = tiny("llama").eval(), tiny("llama", seed=1).eval()
    windows = torch.randint(4, 60, (5, 16))
    found = scoring.score_windows(model, windows, other)
    assert found.nll == pytest.approx(score_text(model, windows).nll, abs=1e-5)
    assert found.n_tokens == 5 * 15
    with torch.no_grad():
        told, truth = (m(input_ids=windows).logits.log_softmax(-1) for m in (model, other))
    assert found.divergence == pytest.approx(float((truth.exp() * (truth - told)).sum(-1).mean()), abs=1e-5)
    assert scoring.score_windows(model, windows).divergence is None


def test_parts_of_windows_and_of_forwards_do_not_change_a_score(monkeypatch):
    model, windows = tiny("llama").eval(), torch.randint(4, 60, (5, 16))
    whole = scoring.score_windows(model, windows, model)
    monkeypatch.setattr(scoring, "TOKENS", 32)
    monkeypatch.setattr(scoring, "HEAD_TOKENS", 10)
    parts = scoring.score_windows(model, windows, model)
    assert parts.nll == pytest.approx(whole.nll, abs=1e-5)
    assert whole.divergence == parts.divergence == 0


def test_a_variant_changes_constants_for_its_job_only():
    from optimum_freeact.calibration import closed_form
    from optimum_freeact.transforms import fit

    before = (closed_form.BALANCE, fit.SUBSPACE_ITERATIONS)
    perform._set_constants({"calibration.closed_form.BALANCE": "changed"})
    assert (closed_form.BALANCE, fit.SUBSPACE_ITERATIONS) == ("changed", before[1])
    perform._set_constants({"transforms.fit.SUBSPACE_ITERATIONS": "too"})
    assert (closed_form.BALANCE, fit.SUBSPACE_ITERATIONS) == (before[0], "too")
    perform._set_constants({})
    assert (closed_form.BALANCE, fit.SUBSPACE_ITERATIONS) == before


def test_the_sweep_holds_all_pairs_of_groups_once():
    plan = a_plan()
    plan.sweep([576, 1536])
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    pairs = {
        (job.quantize.get("weight_group_size", 0), job.quantize.get("activation_group_size", 0)) for job in plan.jobs
    }
    assert pairs == {(w, a) for w in GRIDS for a in GRIDS} | {(0, 0)}


def test_a_job_survives_json_and_its_key_knows_no_folders():
    plan = a_plan()
    plan.presets()
    job = plan.jobs[0]
    again = Job.from_json(json.dumps(dataclasses.asdict(job)))
    assert again == job
    moved = dataclasses.replace(job, model_path="b", texts=(Text("handbook", "c", (0, 10), 20),))
    assert moved.key == job.key
    assert dataclasses.replace(job, seed=7).key != job.key


def test_an_absent_job_leaves_rows_that_say_why():
    plan = a_plan()
    plan.peers()
    [row] = absent(plan.jobs[0], "not installed")
    assert (row["value"], row["n_tokens"]) == (None, 35)
    assert "not installed" in row["note"]


def test_the_recorded_command_names_no_folder_of_this_machine():
    shown = run.shown_command(["--model-path", "smollm2=/some/where/smollm2", "--out", "/tmp/x", "--jobs", "4"])
    assert shown == "python benchmarks/accuracy/run.py --model-path smollm2=smollm2 --out x --jobs 4"


# --- the whole ---------------------------------------------------------------------------------------------------


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
    from tests.helpers.tiny_models import sample_ids, tiny

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
