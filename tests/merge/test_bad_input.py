"""What users get wrong or disks do to them: one clear line, and no half-written folder."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mergekit_ot import disk
from mergekit_ot.anchors import CalibrationError, match_text, require_fast
from mergekit_ot.bundle import BundleError, PlanBundle, load_bundle
from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.cli import main
from mergekit_ot.pipeline import merge_recipe
from mergekit_ot.planning import match_pair, open_pair, record_pair, row_bytes
from mergekit_ot.recipe import RecipeError, load_recipe
from mergekit_ot.report.evaluate import Evaluation
from mergekit_ot.report.page import write_report
from mergekit_ot.rows import RowStore
from mergekit_ot.structure import UnsupportedModelError
from tests.merge.test_pipeline import OPTIONS, pair, write_recipe
from tests.merge.tiny import build, save, texts, tokenizer, write_texts


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_equal_models_and_unknown_architectures(tmp_path):
    target = save(build(), tmp_path / "target")
    with pytest.raises(ValueError, match="same checkpoint"):
        open_pair(str(target), str(target))
    other = save(build(seed=1), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported; supported are"):
        open_pair(str(target), str(other))
    (other / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UnsupportedModelError, match="quantized checkpoint"):
        open_pair(str(target), str(other))
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        open_pair(str(target), "no-such-org/no-such-model")
    with pytest.raises(UnsupportedModelError, match=r"no model\.safetensors"):
        CheckpointReader(tmp_path)


def test_folders_that_are_no_model_of_their_own(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = write_recipe(tmp_path, target, donor)
    for path in donor.glob("tokenizer*"):
        path.unlink()
    capsys.readouterr()
    code, streams = run(capsys, "check", recipe)
    assert code == 1
    assert f"{donor} holds no tokenizer (tokenizer.json" in streams.err  # transformers would make an empty one
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"model_type": "frobnicate"}))
    code, streams = run(capsys, "check", recipe)
    assert code == 1
    assert "`frobnicate`" in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    (donor / "config.json").rename(donor / "adapter_config.json")
    code, streams = run(capsys, "check", recipe)
    assert code == 1
    assert "is an adapter (LoRA), not a model" in streams.err


def test_an_impossible_layer_map_is_refused_before_anything_is_run(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = write_recipe(tmp_path, target, donor, layer_map="0:9")
    capsys.readouterr()
    for command in (("check", recipe), ("plan", recipe, "--plans", tmp_path / "plans", "--quiet")):
        code, streams = run(capsys, *command)
        assert code == 1
        assert "layer_map '0:9': the target has 4 layers" in streams.err
    assert not list(tmp_path.glob("plans*"))


def test_eval_wants_the_merge_of_this_recipe(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = write_recipe(tmp_path, target, donor)
    capsys.readouterr()
    code, streams = run(capsys, "eval", recipe, tmp_path / "nothing", "--quiet")
    assert code == 1
    assert "holds no merge of this recipe" in streams.err
    assert not list(tmp_path.glob(".mergekit_ot*")), "plans were solved first"
    assert run(capsys, "run", recipe, tmp_path / "out", "--quiet")[0] == 0
    recipe = write_recipe(tmp_path, target, donor, alpha=0.31)
    code, streams = run(capsys, "eval", recipe, tmp_path / "out", "--quiet")
    assert code == 1
    assert "the recipe has 0.31; run it again" in streams.err


def test_short_text_says_how_many_rows_are_needed(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = write_recipe(tmp_path, target, donor)
    write_texts(tmp_path / "texts.txt", texts(1, length=12))
    capsys.readouterr()  # what saving the tiny models printed
    code, streams = run(capsys, "check", recipe)
    assert code == 1
    assert "need at least 72" in streams.err
    assert "calibration.samples" in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    (tmp_path / "texts.txt").unlink()
    assert "there is no file" in run(capsys, "check", recipe)[1].err


def test_check_prints_the_table(tmp_path, capsys):
    _, target, donor = pair(tmp_path, "qwen2", "deepened", tied=False)
    code, streams = run(capsys, "check", write_recipe(tmp_path, target, donor))
    assert code == 0
    assert "| layers | 4 | 6 | the 4 that fit best, in order; 2 donor layers are left out |" in streams.out
    assert "| q, k, v biases | True | True | transported |" in streams.out


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(CalibrationError, match="no fast tokenizer"):
        require_fast(Slow(), "donor")
    assert isinstance(tokenizer(), PreTrainedTokenizerFast)


def test_foreign_folders_are_left_alone(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, target, donor))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an earlier transport merge"):
        merge_recipe(recipe, mine, OPTIONS)
    with pytest.raises(FileExistsError, match="not an earlier bundle of plans"):
        merge_recipe(recipe, tmp_path / "out", OPTIONS, plans=mine)
    with pytest.raises(FileExistsError, match="not an earlier report"):
        write_report(Evaluation({}, 0, {}, {}), mine)
    recipe_file = str(tmp_path / "recipe.yml")
    commands = (
        ("run", recipe_file, str(mine)),
        ("plan", recipe_file, "--plans", str(mine)),
        ("run", recipe_file, str(tmp_path / "out"), "--plans", str(mine)),
        ("run", recipe_file, str(tmp_path / "out"), "--plans", str(donor)),
        ("eval", recipe_file, str(tmp_path / "out"), "--report", str(mine)),
    )
    for command in commands:
        capsys.readouterr()
        assert main(list(command)) == 1, command
        told = capsys.readouterr().err
        assert "exists and is not an earlier" in told, told
        assert len(told.splitlines()) == 1, told
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert (donor / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_the_output(tmp_path):
    """An earlier merge may be replaced, but not where this one reads it, or its plans or texts lie in it."""
    _, target, donor = pair(tmp_path)
    (target / "transport.json").write_text("{}")
    recipe = load_recipe(write_recipe(tmp_path, target, donor))
    for out, plans in ((target, None), (tmp_path / "out", tmp_path / "out" / "plans")):
        with pytest.raises(RecipeError, match="which is read, lies there"):
            merge_recipe(recipe, out, OPTIONS, plans=plans)
    assert (target / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    _, target, donor = pair(tmp_path)
    recipe = write_recipe(tmp_path, target, donor)
    main(["plan", str(recipe), "--plans", str(tmp_path / "plans"), "--quiet"])
    import mergekit.merge

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mergekit.merge.Executor, "run", full)
    capsys.readouterr()
    code, streams = run(capsys, "run", recipe, tmp_path / "out", "--plans", tmp_path / "plans", "--quiet")
    assert code == 1
    assert "No space left on device" in streams.err
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_activations_are_not_begun_where_they_do_not_fit(tmp_path, monkeypatch, capsys):
    _, target, donor = pair(tmp_path, "qwen2", "widened", tied=False)
    recipe = write_recipe(tmp_path, target, donor)
    opened = open_pair(str(target), str(donor))
    matched = match_pair(opened, load_recipe(recipe).calibration, tmp_path)
    rows = sum(len(text.target_rows) for text in matched)
    stores = record_pair(opened, matched, tmp_path / "rows", "key", quiet=True)
    needed = 0
    for store, shape in zip(stores, (opened.target, opened.donor)):
        arrays = store.bytes() - (store.folder / "meta.json").stat().st_size
        assert arrays == rows * row_bytes(shape, "float32")  # what is asked for is what is written
        needed += arrays
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    capsys.readouterr()
    with pytest.raises(OSError, match=rf"activations at {rows} matched rows; calibration\.rows"):
        record_pair(opened, matched, tmp_path / "other", "key", quiet=True)
    assert not (tmp_path / "other").exists()
    record_pair(opened, matched, tmp_path / "rows", "key", quiet=True)  # they are there already
    code, streams = run(capsys, "plan", recipe, "--plans", tmp_path / "plans", "--quiet")
    assert code == 1
    assert "GB free" in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert not (tmp_path / "plans").exists()


def test_an_interrupted_capture_resumes_and_changes_nothing(tmp_path, monkeypatch):
    import mergekit_ot.activations as activations
    from mergekit_ot.pipeline import plan_recipe

    _, target, donor = pair(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, target, donor))
    plan_recipe(recipe, tmp_path / "whole", quiet=True)
    commit, calls = RowStore.commit, []

    def stop_at_second(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(self, rows)

    monkeypatch.setattr(RowStore, "commit", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        plan_recipe(recipe, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(RowStore, "commit", commit)
    seen = []
    monkeypatch.setattr(activations, "tqdm", lambda bar, **_: seen.append(bar) or bar)
    plan_recipe(recipe, tmp_path / "again", quiet=True)
    first, second = (load_bundle(tmp_path / name) for name in ("whole", "again"))
    assert first.info["key"] == second.info["key"]
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])


def test_plans_of_another_pair_or_format_are_refused(tmp_path):
    _, target, donor = pair(tmp_path)
    with pytest.raises(BundleError, match="holds no plans"):
        load_bundle(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, target, donor))
    bundle = PlanBundle({"residual.to_target": torch.eye(2)}, {"target": {}, "donor": {}, "layer_map": []})
    folder = bundle.save(tmp_path / "foreign")
    from dataclasses import replace

    with pytest.raises(ValueError, match="were solved for a target of shape"):
        merge_recipe(replace(recipe, plan=str(folder)), tmp_path / "out", OPTIONS)
    info = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps(info | {"format_version": 99}))
    with pytest.raises(BundleError, match="plan format 99"):
        load_bundle(folder)


def test_non_finite_activations_name_the_place(tmp_path):
    model, target, donor = pair(tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    save(model, target)
    from mergekit_ot.pipeline import plan_recipe

    with pytest.raises(ValueError, match=r"target: activations at h\.2 are not finite"):
        plan_recipe(load_recipe(write_recipe(tmp_path, target, donor)), tmp_path / "plans", quiet=True)


def test_rows_match_where_tokens_end_at_the_same_character():
    small, large = tokenizer(), tokenizer(400)
    text = texts(1, seed=3)[0] + " é ü"
    matched = match_text(text, small, large, skip=3)
    assert matched.target_ids != matched.donor_ids
    for i, j in zip(matched.target_rows, matched.donor_rows):
        assert small.decode(matched.target_ids[: i + 1]) == large.decode(matched.donor_ids[: j + 1])
    assert min(matched.target_rows) >= 3
