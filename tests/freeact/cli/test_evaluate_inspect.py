"""`freeact evaluate` and `freeact inspect` agree with the library and with the files."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_freeact.cli import main
from optimum_freeact.report.evaluate import score_text, tokenize_windows
from tests.freeact.cli.words import OTHER, WINDOWS, tree
from tests.helpers.quantized import quantized
from tests.helpers.tiny_models import tiny, tiny_tokenizer


@pytest.mark.parametrize("model", ["model", "w4a4"])
def test_evaluate_agrees_with_the_library(home, tmp_path, capsys, model):
    words = ["--text", str(home / "other.txt"), *WINDOWS, "--json", str(tmp_path / "new" / "e.json")]
    assert main(["evaluate", str(home / model), *words]) == 0
    found = json.loads((tmp_path / "new" / "e.json").read_text())
    windows = tokenize_windows(OTHER * 20, tiny_tokenizer(), 32, 8)
    expected = score_text(AutoModelForCausalLM.from_pretrained(home / model), windows)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert found["n_tokens"] == expected.n_tokens == 8 * 31
    assert (found["model"], found["text"], found["dtype"]) == (model, "other.txt", "float32")
    assert (found["quantization"] or {}).get("weight_bits") == (4 if model == "w4a4" else None)
    assert f"{found['perplexity']:.3f}" in capsys.readouterr().out
    assert tree(tmp_path) == ["new", "new/e.json"]


def test_inspect_counts_the_bytes_that_are_in_the_file(home, tmp_path, capsys):
    assert main(["inspect", str(home / "w4a4"), "--json", str(tmp_path / "i.json")]) == 0
    found = json.loads((tmp_path / "i.json").read_text())
    tensors = load_file(home / "w4a4" / "model.safetensors")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    ours = sum(size for name, size in sizes.items() if "proj" in name)
    assert found["quantized"] is True
    assert found["size"]["stored_bytes"] == ours == sum(kind["stored_bytes"] for kind in found["kinds"])
    assert sum(rest["n_bytes"] for rest in found["rest"]) == sum(sizes.values()) - ours
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    assert (found["size"]["n_weights"], found["size"]["bf16_bytes"]) == (weights, 2 * weights)
    assert found["ratio"] == pytest.approx(ours / (2 * weights))
    assert len(found["record"]["output_error"]) == found["n_blocks"] == 2
    shown = capsys.readouterr().out
    for words in ("embed_tokens", "lm_head", "embeddings, head", "On cpu runs", "because", "preset freeact"):
        assert words in shown
    assert f"{found['record']['output_error'][1]:.3g}" in shown


def test_inspect_of_a_full_precision_model_says_what_would_be_quantized(home, capsys):
    assert main(["inspect", str(home / "model")]) == 0
    shown = capsys.readouterr().out
    assert "not quantized; this is what would be" in shown
    assert "lm_head" in shown
    assert "On cpu runs" not in shown


def test_inspect_reports_experts(tmp_path, capsys):
    tiny("qwen3_moe").save_pretrained(tmp_path / "moe")
    assert main(["inspect", str(tmp_path / "moe")]) == 0
    shown = capsys.readouterr().out
    assert "mlp.experts.gate_up_proj" in shown
    assert "4 x 64 x 64" in shown  # experts, outputs of gate and up, inputs
    assert "3-D parameters" not in shown
    quantized("qwen3_moe").save_pretrained(tmp_path / "quantized")
    assert main(["inspect", str(tmp_path / "quantized")]) == 0
    shown = capsys.readouterr().out
    assert "mlp.experts.gate_up_proj" in shown
    assert "mlp.experts.gate_up_proj_input" in shown
    assert "3-D parameters" not in shown
