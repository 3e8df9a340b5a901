"""Examples run, quickly and on tiny models; `.ci/run` runs `make first-run`, and with it the example on the real model."""

import importlib.util
import json

import pytest

from tests.helpers.tiny_models import plant_outliers, plant_sink, tiny, tiny_tokenizer
from tests.test_layering import ROOT


TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, 0123456789 times! "


def example(name):
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_chat_model(tmp_path):
    model = tiny("llama")
    plant_outliers(model)
    plant_sink(model)
    model.save_pretrained(tmp_path / "tiny-chat")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-chat")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return tmp_path / "tiny-chat"


def test_quantize_and_chat_on_a_tiny_model(tiny_chat_model, tmp_path, capsys):
    options = ["--quick", "--model", str(tiny_chat_model), "--text", str(tmp_path / "text.txt")]
    options += ["--out", str(tmp_path / "out"), "--seq-len", "64", "--window", "64"]
    rows = example("quantize_and_chat").main(options)
    assert list(rows) == ["full precision", "W4A4"]
    assert rows["W4A4"]["bytes"] < rows["full precision"]["bytes"] / 2
    assert (
        rows["full precision"]["perplexity"] < rows["W4A4"]["perplexity"] < 1.5 * rows["full precision"]["perplexity"]
    )
    shown = capsys.readouterr().out
    assert "What is the capital of France?" in shown
    table = shown[shown.index("perplexity") :]
    for row in rows.values():
        assert f"{row['perplexity']:.2f}" in table
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["preset"] == "freeact"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
