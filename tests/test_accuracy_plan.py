"""The accuracy benchmark's texts and jobs: nothing is calibrated and scored on, and what claims need comes first."""

import dataclasses
import json

import pytest
import torch

from benchmarks.accuracy import perform, run, scoring
from benchmarks.accuracy.claims import QUALITY
from benchmarks.accuracy.jobs import SLICES, Job, Text, absent, bits
from benchmarks.accuracy.plan import CLAIMED, GRIDS, OF_OTHERS, QUAROTS, VARIANTS, Plan
from optimum_freeact import score_text
from optimum_freeact.config_fields import DEFAULTS
from optimum_freeact.presets import PRESETS
from tests.helpers.tiny_models import tiny


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
