"""Quantized models that are cast, copied, pickled and taken apart."""

import copy
import io
import pickle

import pytest
import torch

from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import distance, logits, own_tensors, reload, settings


def test_casts_keep_our_dtypes(model, expected):
    cast = copy.deepcopy(model).to(torch.bfloat16)
    ours = own_tensors(model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in own_tensors(cast).items())
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert distance(logits(cast), expected) < 0.5
    assert torch.equal(logits(cast.to(torch.float64).to(torch.float32)), logits(cast))
    inner = copy.deepcopy(model.model.layers[0].mlp).half()  # a submodule has no guard against it
    assert inner.up_proj.qscale.dtype == torch.float32
    with pytest.raises(ValueError, match="half"):
        model.half()


def test_copies_are_whole_and_independent(model, expected):
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), expected)
    with torch.no_grad():
        for module in quantized_linears(clone).values():
            module.weight.zero_()
            module.prepare()
    assert not torch.equal(logits(clone), expected)
    assert torch.equal(logits(model), expected)
    layer = clone.model.layers[0].self_attn
    assert layer.q_proj.source is layer.k_proj.source is layer.q_proj_input
    assert layer.q_proj_input is not model.model.layers[0].self_attn.q_proj_input


@pytest.mark.parametrize(
    "dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch"]
)
def test_pickling_is_refused_with_the_way_out(model, dump):
    with pytest.raises(TypeError, match=r"not pickled.*save_pretrained\(folder\).*from_pretrained\(folder\)"):
        dump(model)


def test_state_dicts_are_plain_tensors(model, expected, plain_folder):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = reload(plain_folder, quantization_config=settings(seed=1))
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for module in quantized_linears(other).values():
        module.prepare()
    assert torch.equal(logits(other), expected)
