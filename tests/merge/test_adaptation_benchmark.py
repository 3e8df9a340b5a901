"""The adaptation benchmark in miniature: its kit survives the disk, every arm trains, and the controls are made on the spot."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.merge import adaptation, adaptation_claims, kit
from tests.merge.tiny import build, save, texts


OPTIONS = argparse.Namespace(
    texts=6, valid=3, scored=3, length=48, device="cpu", rates=[1e-3, 1e-2], shares=[0.5], alpha=0.2
)
TRAINING = {"texts": 4, "steps": 4, "batch": 3, "every": 2, "arms": list(adaptation.ARMS), "tasks": ["code"]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    tmp_path, monkeypatch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 400}
    folders = {
        "smollm2": save(build(), tmp_path / "smollm2"),
        "donor": save(build("qwen2", seed=5, **sizes), tmp_path / "donor", vocab_size=400),
    }
    chunks = {name: texts(24, seed=i) for i, name in enumerate(("calibration", "train", "valid", "eval"))}
    for module in (kit, adaptation):
        monkeypatch.setattr(module, "TASKS", {"code": kit.Task("donor", lambda _: chunks)})
    for module in (kit, adaptation):
        monkeypatch.setattr(module, "fetch", folders.__getitem__)
    kit.save_kit(kit.match_all("code", OPTIONS), tmp_path / "kit" / "code", folders["donor"])
    loaded = kit.load_kit(tmp_path / "kit" / "code")
    gift = kit.take(loaded, folders["smollm2"], folders["donor"], "cpu")
    kit.save_gift(gift, tmp_path / "kit" / "code" / "real.safetensors")
    monkeypatch.setattr(adaptation, "PROMPT", 8)
    for name, value in {"WRITINGS": 2, "PROMPT": 8, "WRITTEN": 9, "SIDE_BY_SIDE": 5}.items():
        monkeypatch.setattr(kit, name, value)
    tokenizers = [AutoTokenizer.from_pretrained(folders[name]) for name in ("smollm2", "donor")]
    written = kit.write_texts(loaded, folders["smollm2"], folders["donor"], tokenizers, "cpu")
    kit.save_gift(written, tmp_path / "kit" / "code" / "written.safetensors")
    (folders["donor"] / "model.safetensors").unlink()  # from here on the donor is not needed
    options = argparse.Namespace(**vars(OPTIONS) | TRAINING | {"kit": Path(tmp_path / "kit")})
    yield gift, adaptation.Bench("code", 1, options)
    monkeypatch.undo()


def test_a_gift_comes_back_from_disk(bench):
    gift, made = bench
    found = made.give("real")
    assert found.weights.keys() == gift.weights.keys()
    for name, weight in gift.weights.items():
        assert (found.weights[name] - weight).abs().max() <= 0.005 * weight.abs().max()
    assert len(found.lessons) == 6
    assert len(made.lessons("real")) == 4
    for mine, given in zip(found.lessons, gift.lessons):
        assert torch.equal(mine.ids, given.ids)
        assert torch.equal(mine.tokens, given.tokens)
        torch.testing.assert_close(mine.probabilities, given.probabilities, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mine.states, given.states, atol=0.02, rtol=0.0)


def test_a_donor_goes_on_from_the_texts_of_its_seed(bench):
    _, made = bench
    texts = made.lessons("real", writer="real")
    assert len(made.written("real")) >= 4  # two of each text, less those without a matched position
    starts = [made.kit.train[i].target_ids[:4] for i in made.part]
    assert all(lesson.ids[:4].tolist() in starts for lesson in texts)
    assert all(lesson.states is None for lesson in made.written("real"))
    assert {len(lesson.ids) for lesson in made.written("target")} <= {17}
    assert not {tuple(lesson.ids.tolist()) for lesson in made.written("real")} & {
        tuple(lesson.ids.tolist()) for lesson in made.written("target")
    }


def test_every_arm_runs_at_the_rate_of_the_control(bench):
    _, made = bench
    rows = made.all_arms()
    after = [row for row in rows if row["when"] == "after" and row["metric"] == "nll"]
    assert {row["arm"] for row in after} == set(adaptation.ARMS)
    valid = {
        row["rate"]: row["value"]
        for row in rows
        if (row["arm"], row["when"], row["metric"]) == ("none", "after", "valid")
    }
    best = min(valid, key=valid.get)
    assert {row["rate"] for row in after if row["arm"] != "none"} == {best}
    before = {row["arm"]: row["value"] for row in rows if row["when"] == "before" and row["metric"] == "nll"}
    assert before["merge"] != before["none"] == before["teacher"]
    nll = {row["arm"]: row["value"] for row in after if row["rate"] == best}
    assert (
        len(
            {
                nll[arm]
                for arm in (
                    "none",
                    "shrink",
                    "teacher",
                    "teacher, random donor",
                    "stream",
                    "merge",
                    "own texts",
                    "writer and teacher",
                )
            }
        )
        == 8
    )
    (one,) = adaptation_claims.claims([*rows, *adaptation.budget(made.options)])
    assert one["id"] == "merge.unrelated.donor_specific_gain_nats"
