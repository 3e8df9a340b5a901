"""SmolLM2-135M-Instruct, its first blocks: real outliers, a real sink, a real tokenizer and text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_freeact import FreeActConfig, save, score_text, tokenize_windows
from optimum_freeact.modules.surgery import quantized_linears


LAYERS = 5  # of 30: the sink has formed after the third; errors and gaps are those of eight


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=LAYERS, **arguments)


@pytest.fixture(scope="module")
def windows(smollm2, handbook):
    return tokenize_windows(handbook.read_text()[80_000:90_000], AutoTokenizer.from_pretrained(smollm2), 128, 2)


@pytest.fixture(scope="module")
def plain(smollm2):
    return load(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(smollm2, handbook):
    config = FreeActConfig(
        dataset=[handbook.read_text()[:20_000]], n_samples=4, batch_size=2, seq_len=128, progress=False
    )
    return load(smollm2, dtype=torch.float32, quantization_config=config)


@torch.no_grad()
def divergence(model, plain, windows):
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    a, b = (torch.log_softmax(each(input_ids=windows).logits, -1).flatten(0, 1) for each in (model, plain))
    return float(torch.nn.functional.kl_div(a, b, log_target=True, reduction="batchmean"))


def test_calibration_ran_on_every_linear(model):
    assert len(quantized_linears(model)) == 7 * LAYERS
    errors = model.config.quantization_config.calibration_record["output_error"]
    assert len(errors) == LAYERS
    assert max(errors) < 0.2


def test_four_bits_stay_near_full_precision(model, plain, windows, smollm2, handbook):
    """Plain rounding is far off on the same text; ours is near, and loses next to nothing of what five blocks know."""
    nearest = FreeActConfig("rtn", dataset=[handbook.read_text()[:20_000]], n_samples=1, seq_len=128, progress=False)
    rounded = load(smollm2, dtype=torch.float32, quantization_config=nearest)
    ours, theirs = divergence(model, plain, windows), divergence(rounded, plain, windows)
    assert ours < 0.3
    assert ours < 0.5 * theirs
    assert abs(score_text(model, windows).nll - score_text(plain, windows).nll) < 0.1


def test_saved_and_reloaded_is_bit_equal_and_small(model, plain, windows, tmp_path):
    folder = save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(input_ids=windows).logits, model(input_ids=windows).logits)
    inner = sum(p.numel() * 2 for p in plain.model.layers.parameters() if p.ndim == 2)
    stored = sum(
        t.numel() * t.element_size() for n, t in again.model.layers.state_dict().items() if "layernorm" not in n
    )
    assert stored / inner < 0.33


def test_it_says_what_the_plain_model_says(model, plain, windows, smollm2):
    """Five blocks write no prose, their distributions are flat, but the likeliest token of 49,152 is mostly the same."""
    with torch.no_grad():
        wanted = plain(input_ids=windows).logits.argmax(-1)
        assert (model(input_ids=windows).logits.argmax(-1) == wanted).float().mean() > 0.5
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    length = inputs.input_ids.shape[1]
    assert text.shape == (1, length + 8)
    with (
        torch.no_grad()
    ):  # with a cache, token by token, it says what it would say at once; one near tie may fall otherwise
        said = model(input_ids=text).logits.argmax(-1)[0, length - 1 : -1]
    assert (said == text[0, length:]).sum() >= 7
