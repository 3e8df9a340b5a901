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
    # a random model may gain a little from noise; a broken one is far off
    assert 0.9 < rows["W4A4"]["perplexity"] / rows["full precision"]["perplexity"] < 1.5
    shown = capsys.readouterr().out
    assert "What is the capital of France?" in shown
    assert "bit by bit" in shown
    table = shown[shown.index("perplexity") :]
    for row in rows.values():
        assert f"{row['perplexity']:.2f}" in table
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["preset"] == "freeact"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_quantize_diffusion_lm_on_a_tiny_model(tiny_chat_model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    options = ["--source", str(tiny_chat_model), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    options += ["--train-seconds", "1", "--mask-id", "103", "--seq-len", "32", "--samples", "4", "--new-tokens", "8"]
    rows = example("quantize_diffusion_lm").main(options)
    assert list(rows) == ["full precision", "W4A4KV4"]
    assert all(0 < value < 20 for row in rows.values() for value in row.values())
    shown = capsys.readouterr().out
    assert "Token types: text, sink, mask" in shown
    assert f"{rows['W4A4KV4']['50% masked']:.3f}" in shown
    assert "| mask |" in (tmp_path / "out" / "page" / "token_types.md").read_text()
    assert json.loads((tmp_path / "out" / "w4a4kv4" / "config.json").read_text())["mask_token_id"] == 103
    again = example("quantize_diffusion_lm").main(
        [*options, "--model", str(tmp_path / "out" / "full"), "--out", str(tmp_path / "b")]
    )
    assert again["full precision"] == rows["full precision"]


def test_quantize_vlm_on_a_tiny_model(tiny_chat_model, tmp_path, capsys):
    import numpy

    (tmp_path / "pictures").mkdir()
    numpy.save(tmp_path / "pictures" / "pictures.npy", numpy.zeros((4, 32, 32, 3), numpy.uint8))
    (tmp_path / "pictures" / "names.json").write_text(json.dumps(["sun", "cat", "key", "owl"]))
    options = [
        "--source",
        str(tiny_chat_model),
        "--pictures",
        str(tmp_path / "pictures"),
        "--out",
        str(tmp_path / "out"),
    ]
    rows = example("quantize_vlm").main(
        [*options, "--train-seconds", "1", "--image-id", "102", "--samples", "2", "--small"]
    )
    assert list(rows) == ["full precision", "W4A4KV4"]
    shown = capsys.readouterr().out
    assert "Token types: text, sink, image" in shown
    assert "top" in shown or "bottom" in shown
    assert f"{rows['W4A4KV4']['caption_nll']:.3f}" in shown
    assert "| image |" in (tmp_path / "out" / "page" / "token_types.md").read_text()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("quantize_and_chat", "--model"), ("quantize_and_chat", "--text"), ("quantize_vlm", "--pictures"),
        ("quantize_diffusion_lm", "--source"), ("journey/run", "--donor"), ("journey/run", "--rows"),
    ],
)  # fmt: skip
def test_a_missing_file_is_said_in_one_line_before_any_work(name, option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example(name).main([option, str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert f"argument {option}: there is no file or folder" in said.err.splitlines()[-1]
    assert said.out == ""
    assert not (tmp_path / "out").exists()
