"""`freeact` on masked-diffusion models, which transformers does not know by itself: in a process that has imported no loader."""

import json

import pytest
import torch

from optimum_freeact.commands.loading import load_windows
from optimum_freeact.report.evaluate_masked import hide_tokens, score_masked
from tests.helpers import forked
from tests.helpers.quantized import answer
from tests.helpers.tiny_diffusion import KINDS, MASK, make
from tests.helpers.tiny_models import tiny_tokenizer


TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, 0123456789 times! "
COMMANDS = """
import contextlib, io, json, sys
from optimum_freeact.cli import main
told = {}
for name, words in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(words)
    told[name] = [code, said.getvalue()]
print(json.dumps(told))
"""
WINDOWS = ["--window", "32", "--tokens", "256", "--quiet"]


@pytest.fixture(scope="module", params=list(KINDS))
def home(request, tmp_path_factory):
    """A model and a text, and what the commands said and wrote."""
    home = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT * 20)
    model, text, quantized, report = (str(home / name) for name in ("model", "text.txt", "w4a4", "report"))
    small = ["--n-samples", "4", "--seq-len", "32", "--batch-size", "2", "--quiet"]
    commands = {
        "inspect": ["inspect", model],
        "quantize": ["quantize", model, quantized, "--dataset", text, *small],
        "inspect quantized": ["inspect", quantized, "--json", str(home / "inspected.json")],
        "evaluate": ["evaluate", model, "--text", text, *WINDOWS, "--json", str(home / "scores.json")],
        "compare": ["compare", model, "--dataset", text, "--text", text, "--out", report, "--presets", "rtn",
                    "--schemes", "W8A8", *WINDOWS, *small[:-1]],
    }  # fmt: skip
    return home, answer(forked.run(json.dumps(commands), code=COMMANDS))


def test_every_command_knows_the_model(home):
    folder, told = home
    for name, (code, said) in told.items():
        assert code == 0, (name, said)
    config = json.loads((folder / "w4a4" / "config.json").read_text())
    assert config["quantization_config"]["token_types"] == ["text", "sink", "mask"]
    assert "upper bound" in told["evaluate"][1]
    found = json.loads((folder / "report" / "comparison.json").read_text())
    assert found["masked"]
    assert "upper bounds" in (folder / "report" / "comparison.md").read_text()


def test_evaluation_is_that_of_hidden_tokens(home):
    folder, _ = home
    found = json.loads((folder / "scores.json").read_text())
    model = KINDS["llada" if "llada" in str(folder) else "dream"][1].from_pretrained(folder / "model")
    windows = load_windows(str(folder / "text.txt"), tiny_tokenizer(), 32, 256, model.config)
    expected = score_masked(model.eval(), windows, hide_tokens(windows, MASK))
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert found["n_tokens"] == 8 * 31
    assert found["of"] == "hidden tokens"
    compared = json.loads((folder / "report" / "comparison.json").read_text())["rows"]
    assert compared[0]["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert abs(compared[1]["excess"]) < 0.1  # eight bits


def test_the_model_cards_example_runs_by_itself(home):
    folder, _ = home
    card = (folder / "w4a4" / "README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    assert "denoise" in snippet
    assert "AutoModelForMaskedLM" in snippet
    assert "pipeline_tag: text-generation" in card
    snippet = snippet.replace("new_tokens=64, steps=32", "new_tokens=4, steps=2")
    run = forked.run(str(folder), code=f"import os, sys\nos.chdir(sys.argv[1])\n{snippet}")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "The cat" in run.stdout


def test_scores_see_the_cache(home):
    """A quantized cache counts, though a pass over a whole window needs none."""
    from optimum_freeact.modules.kv_cache import install_kv_cache
    from optimum_freeact.modules.kv_store import CacheSpec

    folder, _ = home
    model = KINDS["llada" if "llada" in str(folder) else "dream"][1].from_pretrained(folder / "model").eval()
    windows = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    hidden = hide_tokens(windows, MASK)
    before = score_masked(model, windows, hidden).nll
    install_kv_cache(model, CacheSpec(4))
    after = score_masked(model, windows, hidden).nll
    assert after != before
    assert abs(after - before) < 0.2
