"""The token types benchmark in miniature: losses, pictures, clusters, and both models whole."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.token_types import run
from benchmarks.token_types.methods import CLAIMED, METHODS
from benchmarks.token_types.plan import plan
from tools.result_files import problems, read


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
