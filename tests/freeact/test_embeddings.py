"""Embeddings and head in bytes: what they compute, how they are tied, saved, loaded, refused and turned back."""

import pytest
import torch
from torch import nn

from optimum_freeact.modules.embeddings import FreeActEmbedding, FreeActHead, replace_embeddings, row_codes
from optimum_freeact.modules.runtime import dequantize_
from tests.helpers.quantized import distance, logits, quantized, reload, settings
from tests.helpers.tiny_models import sample_ids, tiny


def test_codes_stand_for_rows_within_half_a_step():
    weight = torch.randn(20, 33, dtype=torch.bfloat16)
    weight[3] = 0
    codes, scale = row_codes(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    error = (codes[:, 0].double() * scale.double() - weight.double()).abs()
    assert (error <= 0.51 * scale.double() + 1e-9)[weight.abs() < 126 * scale].all()
    assert not codes[3].any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        row_codes(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2's are tied
def test_they_compute_with_the_rows_that_they_stand_for(family, dtype):
    model = tiny(family).to(dtype)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    replace_embeddings(model)
    model.lm_head.prepare()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FreeActEmbedding)
    assert isinstance(head, FreeActHead)
    assert (head.weight is embedding.weight) == tied
    ids, x = sample_ids(2, 5, seed=1), torch.randn(2, 3, 64).to(dtype)
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, embedding.plain(dtype)))
    want = x.double() @ head.plain(torch.float64).mT
    own = x @ head.plain(dtype).mT
    assert distance(head(x), want) <= 2 * distance(own, want) + 1e-12
    x.requires_grad_()
    head(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_they_give_the_same(tmp_path, family, dtype):
    model = quantized(family, embedding_bits=8)
    model.to(dtype)
    model.save_pretrained(tmp_path / "first")
    first = reload(tmp_path / "first", dtype=dtype)
    for own, module in ((model.lm_head, first.lm_head), (model.model.embed_tokens, first.model.embed_tokens)):
        assert torch.equal(own.weight, module.weight)
        assert torch.equal(own.qscale, module.qscale)
    if dtype == torch.float32:  # in another type the rotary embedding of the first model is rounded
        assert torch.equal(logits(first), logits(model))
    first.save_pretrained(tmp_path)
    again = reload(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), logits(first))
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert embedding.weight.dtype == torch.int8
    assert (head.weight is embedding.weight) == again.config.tie_word_embeddings
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    quantized(family).to(dtype).save_pretrained(tmp_path / "plain")
    plain = sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors"))
    rows = 1 if again.config.tie_word_embeddings else 2
    assert plain - size > rows * 104 * 64 * (dtype.itemsize - 1) - 2000


def test_codes_at_an_odd_address_are_moved():
    head = FreeActHead(64, 104, False, torch.bfloat16)
    room = torch.randint(-127, 128, (104 * 64 + 64,), dtype=torch.int8)
    head.weight.data = room[4 : 4 + 104 * 64].view(104, 1, 64)
    x = torch.randn(8, 64).bfloat16()
    before = head(x)  # made plain in parts
    head.prepare()
    assert head.weight.data_ptr() % 64 == 0
    assert distance(head(x), before) < 0.01


def test_the_report_says_what_they_are():
    from optimum_freeact.report.sizes import unquantized

    rests = {rest.name: rest for rest in unquantized(quantized(embedding_bits=8))}
    assert "embedding_bits=8" in rests["lm_head.weight"].why
    assert rests["model.embed_tokens.weight"].n_bytes == 104 * 64


def test_little_is_lost_and_generation_runs():
    plain, model = quantized(), quantized(embedding_bits=8)
    assert distance(logits(model), logits(plain)) < 0.2  # codes inside the blocks fall differently, too
    out = model.generate(sample_ids(1, 5, seed=2), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_they_become_plain_again(family):
    model = quantized(family, embedding_bits=8)
    embedding = model.get_input_embeddings().plain(torch.float32)
    dequantize_(model, torch.float32)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_embeddings_that_compute_something_are_refused_before_anything_changes():
    model = tiny("gemma3")  # scales its embeddings
    from optimum_freeact.api import quantize

    with pytest.raises(ValueError, match="ScaledWordEmbedding.*embedding_bits=16"):
        quantize(model, settings(embedding_bits=8))
    assert quantize(model, settings()) is model
    with pytest.raises(ValueError, match="embedding_bits must be one of"):
        settings(embedding_bits=4)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_traced_model_gives_the_same():
    model = quantized(embedding_bits=8)
    want = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("fresh_compiler")
def test_the_head_compiles_on_a_cpu(dtype):
    head = FreeActHead(64, 48, False, dtype)
    codes, scale = row_codes(torch.randn(48, 64, dtype=dtype))
    head.weight.data.copy_(codes)
    head.qscale.copy_(scale)
    head.prepare()
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, fullgraph=True)(x), head(x))
