"""The KV cache goes by two names: the one of the installed transformers, and the other one."""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from optimum_freeact.cache_name import NAMES, cache_in, cache_name
from tests.helpers.tiny_models import sample_ids, tiny


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids, cache=None):
        return cache


class Head(nn.Module):
    """Passes everything on."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def get_decoder(self):
        return self.decoder

    def forward(self, **kwargs):
        return self.decoder(**kwargs)


def test_what_a_forward_calls_its_cache():
    assert cache_name(Old()) == cache_name(Head(Old())) == "past_key_values"
    assert cache_name(New()) == cache_name(Head(New())) == "cache"
    assert cache_name(nn.Linear(2, 2)) is None
    assert Head(New())(input_ids=None, **{cache_name(Head(New())): 3}) == 3


def test_a_cache_is_found_under_either_name():
    for name in NAMES:
        other = next(n for n in NAMES if n != name)
        assert cache_in({name: 3, other: None}) == cache_in({name: 3}) == 3
    assert cache_in({"use_cache": True}) is None


@torch.no_grad()
def test_the_installed_transformers_knows_the_name():
    model, ids = tiny("llama"), sample_ids(1, 5)
    for module in (model, model.get_decoder()):
        cache = DynamicCache(config=model.config)
        module(input_ids=ids, **{cache_name(module): cache})
        assert cache.get_seq_length() == 5
