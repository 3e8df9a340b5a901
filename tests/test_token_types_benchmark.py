"""The token type benchmark: claims follow from rows, and a miniature runs whole."""

import json
import time
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.token_types import cost_claims, run, runner
from benchmarks.token_types.claims import claims, losses, won_back
from benchmarks.token_types.methods import CLAIMED, METHODS, bits
from benchmarks.token_types.plan import plan, timing
from benchmarks.token_types.table import assemble
from tools.result_files import problems, read


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


class FakeWorker:
    """Answers at once, and notes which jobs ran beside each."""

    running: dict = {}
    log: list = []

    def __init__(self, gpu, threads, log):  # noqa: ARG002
        self.gpu = gpu

    def start(self):
        pass

    stop = start

    def ask(self, job, seconds):  # noqa: ARG002
        beside = self.running.setdefault(self.gpu, [])
        self.log.append((self.gpu, job, list(beside)))
        beside.append(job)
        time.sleep(0.02)
        beside.remove(job)
        return {"error": "broken"} if job.model == "vlm" and job.group == "train" else {"rows": []}


def test_jobs_wait_for_their_model_and_the_timing_is_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0", "1"])
    monkeypatch.setattr(FakeWorker, "log", [])
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--no-ablations"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    timed = timing(options)
    done = runner.Runner(options, "0" * 40)
    done.run([*training, *timed, *jobs], 6)
    started = [job for _, job, _ in FakeWorker.log]
    assert {job.key for job in started} == {job.key for job in [*training, *timed, *jobs] if job.model != "vlm"} | {
        job.key for job in training
    }
    for gpu, job, beside in FakeWorker.log:
        if job.group == "time":
            assert (gpu, beside) == ("0", [])
            assert job is started[-1]
        assert job.group in ("train", "warm") or not any(other.group == "train" for other in beside)
    assert [job.model for job in started if job.group == "train"] == ["diffusion", "vlm", "three_types"]
    trained = [gpu for gpu, job, _ in FakeWorker.log if job.group == "train"]
    assert trained == ["0", "1", "0"]
    missing = assemble([job for job in jobs if job.model == "vlm"], done)
    assert {row["note"] for row in missing} == {"not run"}
    assert "broken" in capsys.readouterr().out


class FullWorker(FakeWorker):
    """Has memory for two jobs at a time."""

    def ask(self, job, seconds):  # noqa: ARG002
        beside = self.running.setdefault(self.gpu, [])
        self.log.append((self.gpu, job, list(beside)))
        beside.append(job)
        time.sleep(0.02)
        full = len(beside) > 2
        beside.remove(job)
        return {"error": "OutOfMemoryError: CUDA out of memory. Process 7"} if full else {"rows": []}


def test_a_job_that_finds_no_memory_comes_again_among_fewer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "Worker", FullWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0"])
    monkeypatch.setattr(FullWorker, "log", [])
    monkeypatch.setattr(runner, "TRIES", 100)
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--models", "vlm", "--no-timing"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    kept = []
    done = runner.Runner(options, "0" * 40, lambda: kept.append(1))
    done.run([*training, *jobs], 6)
    assert set(done.told) == {job.key for job in [*training, *jobs]}
    assert len(kept) == len(done.told)
    assert done.failures == {}
    assert "no memory for vlm" in capsys.readouterr().out
    again = [len(beside) for _, _, beside in FullWorker.log[-10:]]
    assert max(again) <= 1


def test_a_job_that_never_finds_memory_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0"])
    answer = {"error": "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"}
    asked = []
    monkeypatch.setattr(FakeWorker, "ask", lambda _, job, __: asked.append(job) or answer)
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--models", "vlm", "--no-timing"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    done = runner.Runner(options, "0" * 40)
    done.run([*training, *jobs], 3)
    assert asked == training * runner.TRIES
    assert list(done.failures) == [training[0].key]


def test_the_cost_of_types_is_measured_alone(tmp_path):
    from benchmarks.token_types import cost

    small = ["--shapes", "135m", "--tokens", "3", "--repeats", "2", "--copies", "2", "--threads", "1"]
    assert cost.main(["--device", "cpu", *small, "--out", str(tmp_path)]) == 0
    document = read(tmp_path / "token_types_cost_cpu.json")
    assert problems(document) == []
    assert document["claims"] == []  # the claim is about a GPU
    assert [entry["id"] for entry in cost_claims.claims(document["rows"])] == ["token_types.three_types_time_ratio"]
    same = [row["value"] for row in document["rows"] if row["metric"] == "mixed_batch_differences_same"]
    assert same == [0, 0, 0]  # of each tier


def test_windows_to_choose_by_are_not_those_that_are_shown():
    from benchmarks.token_types.diffusion import windows_beside, windows_of

    stream = torch.arange(44 * 8)
    shown, others = (f(stream, 24, 8)[:, 0].tolist() for f in (windows_of, windows_beside))
    assert len(set(shown)) == 24
    assert len(set(others)) == 20
    assert not set(shown) & set(others)


def test_lanes_may_differ_by_gpu():
    assert runner.spread(["a", "b"], 3) == ["a", "b", "a"]
    assert runner.spread(["a", "b"], [3, 1]) == ["a", "b", "a", "a"]
    assert runner.spread(["a"], [2, 9]) == ["a", "a"]
    assert run.slots("9,4", 2) == [9, 4]
    assert (run.slots(None, 2), run.slots("0", 2)) == (2, 0)


def test_a_result_tells_how_it_was_made_but_not_where(monkeypatch):
    monkeypatch.setattr(
        run.result_files, "command_line", lambda: "python run.py --jobs 4 --work /tmp/x --seeds 0 --out out"
    )
    assert run.command() == "python run.py --jobs 4 --seeds 0"


def test_a_value_that_is_no_number_is_a_row_with_a_reason():
    from benchmarks.token_types.table import finite

    assert finite({"metric": "masked_nll", "value": 1.0}) == {"metric": "masked_nll", "value": 1.0}
    assert finite({"metric": "masked_nll", "value": float("nan")})["value"] is None
    assert "nan" in finite({"metric": "masked_nll", "value": float("nan")})["note"]


def test_losses_of_parts_sum_to_that_of_the_batch():
    from benchmarks.token_types.diffusion import adapt, descend, diffusion_losses
    from tests.helpers.tiny_models import tiny

    model = adapt(tiny("llama"), 103)
    ids = torch.randint(0, 100, (6, 16), generator=torch.Generator().manual_seed(0))
    found = {}
    for part in (6, 4):
        model.zero_grad()
        loss = descend(diffusion_losses(model, ids, torch.Generator().manual_seed(1), part))
        found[part] = float(loss), model.lm_head.weight.grad.clone()
    assert found[4][0] == pytest.approx(found[6][0], rel=1e-5)
    assert torch.allclose(found[4][1], found[6][1], atol=1e-6)


def test_a_picture_apart_is_what_the_cache_holds(tmp_path):
    """Half of each training batch: logits of the caption as if start and picture had come through a cache."""
    from transformers import AutoModelForCausalLM

    from benchmarks.token_types import vision
    from benchmarks.token_types.sizes import TINY
    from benchmarks.token_types.tiny import tiny_inputs
    from benchmarks.token_types.vision_world import scenes_of
    from optimum_freeact.cache_name import cache_name

    measure = {**TINY["three_types"], **tiny_inputs(tmp_path)}
    scenes = scenes_of(measure)
    source = AutoModelForCausalLM.from_pretrained(measure["source"], dtype=torch.float32)
    model = vision.assemble(source, scenes.image_id, measure["mask_id"], measure["sight"]).eval()
    inputs = scenes.inputs(scenes.draw(3, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        apart = model(**vision.with_head_apart(inputs, torch.arange(2)), use_cache=False).logits[:, vision.HEAD :]
        head = {name: value[:, : vision.HEAD] for name, value in inputs.items() if name != "pixel_values"}
        told = model(**head, pixel_values=inputs["pixel_values"], use_cache=True)
        rest = {"input_ids": inputs["input_ids"][:, vision.HEAD :], "attention_mask": inputs["attention_mask"]}
        cached = model(**rest, **{cache_name(model): told.past_key_values}, use_cache=True).logits
        whole = model(**inputs, use_cache=False).logits[:, vision.HEAD :]
    real = inputs["attention_mask"][:, vision.HEAD :].bool()
    assert torch.allclose(apart[:2][real[:2]], cached[:2][real[:2]], atol=1e-4)
    assert torch.allclose(apart[2][real[2]], whole[2][real[2]], atol=1e-4)
    assert not torch.allclose(apart[0][real[0]], whole[0][real[0]], atol=1e-4)


def test_what_claims_need_comes_first():
    options = run.parser().parse_args(["--device", "cuda", "--train-seconds", "diffusion=5,vlm=7"])
    options.work = Path("work")
    training, jobs = plan(options, {})
    assert [job.measure["train"].get("seconds") for job in training] == [5.0, 7.0, None]
    order = [job.method for job in jobs if job.model == "vlm"]
    claimed = [i for i, job in enumerate(jobs) if job.method in CLAIMED and job.seed == 0]
    assert max(claimed) < min(i for i, job in enumerate(jobs) if job.method not in (*CLAIMED, "fp"))
    assert order[0] == "fp"
    assert {job.seed for job in jobs if job.method == "flatquant"} == {0, 1, 2}
    assert {job.seed for job in jobs if job.group in ("ablation", "control")} == {0}


METHODS_TRIED = ("flatquant", "freeact-paper", "freeact")


def test_the_miniature_runs_whole(tmp_path, capsys):
    arguments = ["--tiny", "--models", "diffusion", "--seeds", "0", "--methods", ",".join(METHODS_TRIED)]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    document = read(tmp_path / "out" / "token_types.json")
    assert problems(document) == []
    rows = document["rows"]
    assert {row["method"] for row in rows if row["model"] != "layers"} == {"fp", "train", *METHODS_TRIED}
    assert all(row["value"] is not None for row in rows)
    for preset in ("freeact", "freeact-fast"):
        timed = {row["metric"]: row["value"] for row in rows if (row["model"], row["method"]) == ("layers", preset)}
        assert timed["three_types_time_ratio"] > 0 < timed["one_type_time_ratio"]
        assert timed["mixed_batch_differences_same"] == 0
    scored = [r for r in rows if r["method"] == "freeact" and r["metric"] == "masked_nll"]
    assert {(r["setting"], r["mode"], r["ratio"]) for r in scored} == {
        (setting, mode, ratio)
        for setting, mode in (("w4a4", "whole"), ("w4a4kv4", "cached"))
        for ratio in (0.15, 0.50, 0.85)
    }
    noted = next(r["note"] for r in rows if r["method"] == "freeact" and r["metric"] == "calibration_seconds")
    assert noted == "text, sink, mask"
    assert (
        next(r["note"] for r in rows if r["method"] == "freeact-paper" and r["metric"] == "calibration_seconds")
        == "text, mask; 1 epochs"
    )
    loud = {(r["type"], r["input"]) for r in rows if r["metric"] == "loudness"}
    assert loud == {(kind, shown) for kind in ("text", "mask") for shown in ("q+k+v", "o", "gate+up", "down")}
    assert "won back" in capsys.readouterr().out
    before = json.dumps(rows)
    assert run.main(arguments) == 0  # everything is there already: nothing is measured again
    assert json.dumps(read(tmp_path / "out" / "token_types.json")["rows"]) == before
    assert set(METHODS_TRIED) < set(METHODS)


def test_the_miniature_of_the_others_runs_whole(tmp_path):
    arguments = ["--tiny", "--models", "vlm,three_types", "--seeds", "0", "--methods", "freeact", "--no-timing"]
    assert run.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "token_types.json")["rows"]
    assert all(row["value"] is not None for row in rows)
    notes = {row["model"]: row["note"] for row in rows if row["metric"] == "calibration_seconds"}
    assert notes == {"vlm": "text, sink, image", "three_types": "text, sink, mask, image"}
    metrics = {
        model: {row["metric"] for row in rows if (row["model"], row["method"]) == (model, "freeact")}
        for model in notes
    }
    assert {"caption_nll", "caption_accuracy", "exact_match", "retrieval_accuracy"} < metrics["vlm"]
    assert {"masked_nll", "masked_accuracy", "caption_accuracy", "exact_match"} < metrics["three_types"]


def test_scenes_show_what_their_captions_say(tmp_path):
    from benchmarks.token_types.scenes import HEAD, N_PATCHES, NOTHING, Scenes
    from tests.helpers.tiny_models import tiny_tokenizer

    numpy.save(
        tmp_path / "pictures.npy", numpy.stack([numpy.full((32, 32, 3), 50 * i, numpy.uint8) for i in range(4)])
    )
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "c", "d"]))
    tokenizer = tiny_tokenizer(bos=False)
    scenes = Scenes(str(tmp_path), tokenizer, 102, 1, 2)
    cells = scenes.draw(16, torch.Generator().manual_seed(0), at_least=2)
    assert ((cells != NOTHING).sum(1) >= 2).all()
    inputs = scenes.inputs(cells)
    assert (inputs["input_ids"] == 102).sum(1).tolist() == [N_PATCHES] * 16
    for i, row in enumerate(cells.tolist()):
        told = tokenizer.decode(inputs["input_ids"][i, HEAD:][inputs["attention_mask"][i, HEAD:].bool()][:-1])
        for place, (name, y, x) in enumerate(
            (name, 32 * (p // 2), 32 * (p % 2))
            for p, name in enumerate(("top left", "top right", "bottom left", "bottom right"))
        ):
            corner = inputs["pixel_values"][i, 0, y, x].item()
            assert (f" {name}:" in told) == (row[place] != NOTHING)
            assert corner == (1.0 if row[place] == NOTHING else scenes.pictures[row[place], 0, 0, 0].item())


def test_directions_never_leave_more_than_as_many_cluster_means():
    """Eckart and Young: on the rows they are fitted to, K - 1 principal directions beat any K cluster means."""
    from benchmarks.token_types.discovered import energies
    from optimum_freeact.calibration.discover import kmeans

    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(40)[torch.arange(600) % 5]
    for kinds in (torch.arange(600) % 5, kmeans(x, torch.ones(600), 5)):
        found = energies(x, x, kinds, kinds, 5)
        assert found["rank 4"] <= found["5 cluster means"] + 1e-12
        assert found["rank 28"] <= found["5 cluster means and rank 24"] + 1e-12
    assert found["5 cluster means"] < 0.95


def test_kmeans_finds_what_is_apart():
    from optimum_freeact.calibration.discover import kmeans

    kinds = torch.arange(90) % 3
    points = 10 * torch.eye(3)[kinds] + 0.1 * torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    found = kmeans(points, torch.ones(90), 3)
    assert all(len(found[kinds == k].unique()) == 1 for k in range(3))
    assert len(found.unique()) == 3
