"""The adaptation benchmark in miniature: its kit survives the disk, every arm trains, and processes share the work."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.merge import adaptation, adaptation_claims, adaptation_plan, gifts, kit
from tests.merge.tiny import build, save, texts


SIZES = argparse.Namespace(texts=6, valid=3, scored=3, length=48)
#: The first rate is too high to be chosen; `after` is the better of the two.
SETTINGS = [(0.3, 4, 4), (1e-3, 4, 4)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    tmp_path, monkeypatch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 400}
    folders = {
        "smollm2": save(build(), tmp_path / "smollm2"),
        "donor": save(build("qwen2", seed=5, **sizes), tmp_path / "donor", vocab_size=400),
    }
    chunks = {name: texts(24, seed=i) for i, name in enumerate(("calibration", "train", "valid", "eval"))}
    for module in (kit, gifts, adaptation):
        monkeypatch.setattr(module, "TASKS", {"rust": kit.Task("donor", lambda _: chunks)})
        monkeypatch.setattr(module, "fetch", folders.__getitem__)
    monkeypatch.setattr(adaptation, "AT_ONCE", 3)
    for name, value in {"WRITINGS": 2, "PROMPT": 8, "WRITTEN": 9, "WRITTEN_TOGETHER": 5, "TOP": 300}.items():
        monkeypatch.setattr(gifts, name, value)
    kit.save_kit(kit.match_all("rust", SIZES), tmp_path / "kit" / "rust", folders["donor"])
    yield argparse.Namespace(
        texts=4,
        alpha=0.2,
        arms=list(adaptation.ARMS),
        tasks=["rust"],
        seeds=[1],
        settings=SETTINGS,
        shares=[0.5],
        kit=tmp_path / "kit",
        scratch=tmp_path / "scratch",
        rows=tmp_path / "rows.jsonl",
        plan=None,
        late_assets=False,
        resume=None,
        device="cpu",
    )
    monkeypatch.undo()


def test_a_kit_comes_back_from_disk(options):
    found = kit.load_kit(options.kit / "rust")
    made = kit.match_all("rust", SIZES)
    assert (found.train, found.valid, found.scored) == (made.train, made.valid, made.scored)
    assert found.spelling == made.spelling
    assert len(kit.digest(found)) == 16


@pytest.fixture(scope="module")
def givers(options):
    return adaptation.Bench(options).givers("rust")


def test_a_donor_goes_on_from_the_texts_of_its_seed(options, givers):
    part = adaptation.Bench(options).part(adaptation.Job("rust", 1, 4, "none"))
    assert len(part) == 4
    written = {giver: givers.written(giver, 1, part) for giver in ("real", "target", "random")}
    starts = [givers.kit.train[i].target_ids[:4] for i in part]
    for giver, made in written.items():
        assert 4 <= len(made) <= 8, giver
        assert all(row[:4].tolist() in starts for row in made.ids)
        assert made.taught.any(dim=1).all()
    assert set(written["target"].lengths.tolist()) == {17}
    whole = {giver: {tuple(row.tolist()) for row in made.ids} for giver, made in written.items()}
    assert not whole["real"] & whole["target"]
    assert not whole["real"] & whole["random"]


def test_shuffled_lessons_are_the_same_ones_at_other_positions(givers):
    real = givers.lessons("real", None)
    dealt = gifts.shuffled(real, 3)
    assert torch.equal(real.taught, dealt.taught)
    assert torch.equal(real.ids, dealt.ids)
    rows = [made.probabilities[made.taught].float() for made in (real, dealt)]
    assert not torch.equal(*rows)
    assert torch.equal(rows[0].sum(0).half(), rows[1].sum(0).half())
    assert torch.equal(gifts.shuffled(real, 3).tokens, dealt.tokens)
    assert not dealt.probabilities[~dealt.taught].any()


def test_a_lead_is_measured_on_the_same_characters(givers, options):
    lead = givers.lead(count=2)
    text = givers.kit.train[0]
    assert lead == givers.lead(count=2)
    assert lead != givers.lead(count=1)
    assert -5 < lead < 5
    own = givers.donor
    givers.donor = givers.target
    try:
        givers.kit.train[0] = kit.MatchedText(text.target_ids, text.target_ids, text.target_rows, text.target_rows)
        assert givers.lead(count=1) == 0.0
    finally:
        givers.donor, givers.kit.train[0] = own, text


def test_the_target_is_its_own_perfect_teacher(givers, options):
    made = givers.lessons("target", None)
    model = build().eval()
    batch = made.pick([0, 1])
    with torch.no_grad():
        logits = model(batch.ids.long()).logits[:, :-1]
    own = adaptation.lesson_loss(model, batch, adaptation_plan.Arm(), 0.0)
    lessons = adaptation.lesson_loss(model, batch, adaptation_plan.Arm(teacher="target"), 1.0)
    counted = torch.arange(logits.shape[1]) < batch.lengths[:, None] - 1
    picked = torch.log_softmax(logits, -1).gather(-1, batch.ids[:, 1:, None].long()).squeeze(-1)
    torch.testing.assert_close(own, -picked[counted].mean(), rtol=1e-5, atol=1e-5)
    entropy = -(torch.log_softmax(logits, -1) * torch.softmax(logits, -1)).sum(-1)[counted].mean()
    torch.testing.assert_close(lessons, entropy, rtol=1e-3, atol=1e-3)
    half = adaptation.lesson_loss(model, batch, adaptation_plan.Arm(teacher="target"), 0.5)
    torch.testing.assert_close(half, (own + lessons) / 2, rtol=1e-5, atol=1e-5)


def test_every_arm_runs_once_with_every_setting(options):
    first, second = adaptation.Bench(options), adaptation.Bench(options)
    taken = next(job for job in first.jobs() if job.setting and job.name == "shrink")
    assert second.claim(taken)  # as another process would
    first.work()
    second.work()
    rows = [json.loads(line) for line in Path(options.rows).read_text().splitlines()]
    assert [row["task"] for row in rows if row["metric"] == "lead"] == ["rust"]
    rows = [row for row in rows if row["metric"] != "lead"]
    again = adaptation.Bench(argparse.Namespace(**vars(options) | {"resume": [options.rows]}))
    assert {job for job in again.jobs() if job.setting} == {taken}
    assert {job.name for job in again.jobs() if not job.setting} == {"lessons target"}
    after = [row for row in rows if (row["when"], row["metric"]) == ("after", "nll")]
    runs = [(row["arm"], row["rate"]) for row in after]
    assert len(runs) == len(set(runs))
    assert set(runs) == {
        (arm, rate) for arm in adaptation.ARMS for rate, _, _ in SETTINGS if (arm, rate) != ("shrink", SETTINGS[0][0])
    }
    before = {row["arm"]: row["value"] for row in rows if (row["when"], row["metric"]) == ("before", "nll")}
    assert before["merge"] != before["none"] == before["teacher"]
    nll = {row["arm"]: row["value"] for row in after if row["rate"] == 1e-3}
    assert len(set(nll.values())) == len(nll), "two arms came to the same"
    (one,) = adaptation_claims.claims([*rows, *adaptation.budget(options)])
    assert one["id"] == "merge.unrelated.donor_specific_gain_nats"
    assert {row.get("arm") for row in adaptation_claims.summary(rows)} == {*adaptation.ARMS, None}


def test_a_full_gpu_is_tried_again_later(options, monkeypatch, tmp_path):
    rows, asked = tmp_path / "rows.jsonl", []
    chosen = {"arms": ["none"], "scratch": tmp_path / "scratch", "rows": rows}
    bench = adaptation.Bench(argparse.Namespace(**vars(options) | chosen))
    run = bench.run

    def full_at_first(job):
        asked.append(job)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("full")
        run(job)

    monkeypatch.setattr(bench, "run", full_at_first)
    monkeypatch.setattr(adaptation, "PAUSE", 0.0)
    bench.work()
    assert len(asked) == 3
    assert asked[0] == asked[2]
    rates = [json.loads(line)["rate"] for line in rows.read_text().splitlines() if '"after"' in line]
    assert set(rates) == {rate for rate, _, _ in SETTINGS}


def test_what_needs_a_checkpoint_that_is_still_to_come_waits_for_it(options, monkeypatch, tmp_path):
    late = argparse.Namespace(**vars(options) | {"late_assets": True})
    monkeypatch.setattr(adaptation, "ROOT", tmp_path)
    bench = adaptation.Bench(late)
    waiting = {job.name for job in bench.jobs() if not bench.ready(job)}
    assert {"lead", "lessons real", "plans random"} <= waiting
    assert not {"lessons target", "written target", "none"} & waiting
    (tmp_path / "donor").mkdir()
    assert all(bench.ready(job) for job in bench.jobs())


def test_the_claim_takes_the_best_control_and_the_donor_arm_that_validation_chose():
    def run(arm, seed, rate, valid, nll):
        place = {"task": "t", "arm": arm, "seed": seed, "rate": rate, "when": "after"}
        return [place | {"metric": "valid", "value": valid}, place | {"metric": "nll", "value": nll}]

    rows = []
    for seed in (0, 1):
        rows += run("none", seed, 1e-4, 3.0, 3.1) + run("own teacher", seed, 1e-4, 2.9, 3.05)
        rows += run("teacher", seed, 1e-4, 2.8, 2.95) + run("teacher", seed, 2e-4, 2.9, 2.7)
        rows += run("writer", seed, 1e-4, 2.9, 2.6)
    rows += run("writer, random donor", 0, 1e-4, 1.0, 1.0)  # seed 1 was cut off
    (one,) = adaptation_claims.claims(rows)
    assert one["value"] == pytest.approx(3.05 - 2.95)
    assert "'teacher' against 'own teacher'" in one["how"]
    more = [row | {"texts": 100} for row in run("none", 0, 1e-4, 3.0, 3.0) + run("none", 1, 1e-4, 3.0, 3.0)]
    more += [row | {"texts": 100} for row in run("teacher", 0, 1e-4, 2.0, 2.0) + run("teacher", 1, 1e-4, 2.0, 2.0)]
    (one,) = adaptation_claims.claims([*rows, *more])  # more text given: reported, not claimed
    assert one["value"] == pytest.approx(3.05 - 2.95)


def test_the_claim_takes_of_every_donor_the_task_on_which_it_leads_most():
    rows = []
    for task, donor, lead, gain in (("a", "x", 1.0, 0.2), ("b", "x", 0.5, 0.01), ("c", "y", 0.3, 0.1)):
        rows.append({"task": task, "donor": donor, "metric": "lead", "value": lead})
        for arm, loss in (("none", 3.0), ("teacher", 3.0 - gain)):
            place = {"task": task, "arm": arm, "seed": 0, "rate": 1e-4, "when": "after"}
            rows += [place | {"metric": metric, "value": loss} for metric in ("valid", "nll")]
    (one,) = adaptation_claims.claims(rows)
    assert one["value"] == pytest.approx(0.1)
    assert "not claimed, where the donor leads less: b: 0.010" in one["how"]
    (one,) = adaptation_claims.claims([row for row in rows if row["metric"] != "lead"])
    assert one["value"] == pytest.approx(0.01)


def test_the_command_line_gives_all_that_the_work_reads(options, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["adaptation.py", "--late-assets", "--resume", "a.jsonl", "b.jsonl", "--tasks", "rust"]
    )
    found = adaptation.arguments()
    assert set(vars(options)) <= set(vars(found))
    assert found.late_assets
    assert found.resume == [Path("a.jsonl"), Path("b.jsonl")]


def test_the_plan_is_readable(options, monkeypatch):
    monkeypatch.setattr(options, "arms", None)
    groups = adaptation.groups(options)
    assert {arm for group in groups for arm in group["arms"]} <= set(adaptation.ARMS)
    assert groups[0]["settings"] == [(1e-4, 96, 8), (5e-5, 64, 8)]
    assert {name for group in groups for name in group["tasks"]} <= set(kit.TASKS)
    jobs = adaptation.Bench(options).jobs()
    assert {job.texts for job in jobs if job.name != "lead"} == {6}  # no more than the kit has
    assert len(jobs) == len(set(jobs))
