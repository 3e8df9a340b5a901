"""lm-evaluation-harness, by its own command, on a quantized and on a merged model, with a task of local data."""

import json

import pytest
import yaml

from tests.helpers.quantized import fresh_python, quantized
from tests.helpers.tiny_models import tiny_tokenizer


TASK = {
    "task": "local_choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module", autouse=True)
def _harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def evaluate(model, folder) -> dict:
    """Run the harness through our wrapper, which only imports us first; returns its results."""
    rows = [{"question": f"{i} and one is", "choices": [" more", " less"], "answer": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local_choices.yaml").write_text(yaml.safe_dump(task))
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    words += [
        "--tasks",
        "local_choices",
        "--include_path",
        str(folder / "tasks"),
        "--output_path",
        str(folder / "out"),
    ]
    run = fresh_python("", "-m", "lm_eval", *words, module="optimum_freeact.run")
    assert run.returncode == 0, run.stderr[-3000:]
    (found,) = (folder / "out").rglob("results*.json")
    return json.loads(found.read_text())["results"]["local_choices"]


def test_on_a_quantized_model(tmp_path):
    model = quantized("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert 0.0 <= evaluate(tmp_path / "model", tmp_path)["acc,none"] <= 1.0


def test_on_a_merged_model(tmp_path):
    from mergekit.options import MergeOptions

    from mergekit_ot import load_recipe, merge_recipe
    from tests.merge.test_pipeline import pair, write_recipe

    _, target, donor = pair(tmp_path)
    out = merge_recipe(
        load_recipe(write_recipe(tmp_path, target, donor, alpha=0.5)), tmp_path / "m", MergeOptions(quiet=True)
    )
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!", "pad_token": "#"}))
    assert 0.0 <= evaluate(out, tmp_path)["acc,none"] <= 1.0
