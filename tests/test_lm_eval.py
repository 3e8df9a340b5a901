"""lm-evaluation-harness, by its own command, on a quantized and on a merged model, with a task of local data."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import forked
from tests.helpers.quantized import quantized
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
ROWS = [{"question": f"{i} and one is", "choices": [" more", " less"], "answer": i * i % 5 % 2} for i in range(12)]


@pytest.fixture(scope="module", autouse=True)
def _harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def evaluate(model, folder, through: tuple[str, ...]) -> float:
    """Run the harness, `through` a wrapper or as it is; returns the accuracy that it wrote."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
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
    module, *before = *through, "lm_eval"
    run = forked.run(*(["-m", *before] if before else []), *words, module=module)
    assert run.returncode == 0, run.stderr[-3000:]
    (found,) = (folder / "out").rglob("results*.json")
    return json.loads(found.read_text())["results"]["local_choices"]["acc,none"]


@torch.no_grad()
def margins(folder) -> list[float]:
    """By hand: by how much the right continuation of each row is likelier than the other."""
    import optimum_freeact  # noqa: F401 - makes transformers know quantized models

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in ROWS:
        scores = []
        start = len(tokenizer(row["question"])["input_ids"])
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            logps = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        found.append(scores[row["answer"]] - scores[1 - row["answer"]])
    return found


# With another number of threads sums differ in their last bits, an activation at the edge of two codes takes the other one,
# and scores of a tiny model move by hundredths of a nat: such a row may count either way
TIE = 0.05


def check(found: float, folder) -> None:
    """The harness found what one finds by hand, and the task can tell models apart."""
    by_hand = margins(folder)
    assert sum(abs(margin) > TIE for margin in by_hand) >= 0.75 * len(ROWS)
    least, most = (sum(margin > tie for margin in by_hand) / len(ROWS) for tie in (TIE, -TIE))
    assert least - 1e-6 <= found <= most + 1e-6
    assert 0 < found < 1  # else a task that always says the same would pass, too


def test_on_a_quantized_model(tmp_path):
    """The harness does not know us: the wrapper imports us first."""
    quantized("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = evaluate(tmp_path / "model", tmp_path, ("optimum_freeact.run",))
    check(found, tmp_path / "model")


def test_on_a_merged_model(tmp_path):
    """An ordinary checkpoint: the harness alone."""
    from mergekit.options import MergeOptions

    from mergekit_ot import load_recipe, merge_recipe
    from tests.merge.test_pipeline import pair, write_recipe

    _, target, donor = pair(tmp_path)
    out = merge_recipe(
        load_recipe(write_recipe(tmp_path, target, donor, alpha=0.5)), tmp_path / "m", MergeOptions(quiet=True)
    )
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!", "pad_token": "#"}))
    found = evaluate(out, tmp_path, ())
    check(found, out)
