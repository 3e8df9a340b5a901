"""Generation and padded batches with the installed cache: equal to one quantized prefill per step, row by row."""

import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache

from optimum_freeact.cache_name import cache_name
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_layer import FreeActCacheLayer
from optimum_freeact.modules.kv_means import cache_means
from optimum_freeact.modules.kv_store import CacheSpec
from tests.helpers.tiny_decoders import FAMILIES, prompt, tiny_decoder


CLOSE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def prefill_every_step(model):
    """Make a model that is called with `use_cache=False` run each forward through a fresh (then quantized) cache."""

    def hook(module, args, kwargs):
        if kwargs["use_cache"] is False:  # some models hand back a cache nevertheless: never reuse one
            kwargs[cache_name(module)] = DynamicCache(config=module.config)
        return args, kwargs

    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def both_of(model):
    """Rotated, and about means of its own."""
    means = cache_means(model, prompt(tokens=20).to(model.device))
    return CacheSpec(4, rotate=True, **means._asdict())


def generate(model, ids, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_equals_prefill_every_step(family, options):
    model, ids = tiny_decoder(family), prompt()
    exact = generate(model, ids, **options)
    prefill_every_step(model)
    install_kv_cache(model, both_of(model))
    quantized = generate(model, ids, **options)
    assert torch.equal(quantized, generate(model, ids, use_cache=False, **options))
    assert quantized.shape == (2 * options.get("num_return_sequences", 1), ids.shape[1] + 10)
    assert not torch.equal(quantized, exact)  # the cache was in use


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_generates_the_same(monkeypatch):
    """What the cache does is left to Python, as a whole: rows grow with each call, and its tables are made once."""
    from torch._dynamo.utils import counters

    model, ids = tiny_decoder("llama"), prompt()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    install_kv_cache(model, both_of(model))
    want = generate(model, ids, attention_mask=mask, max_new_tokens=4)
    counters.clear()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # torch says so where it traces a cached function
        assert torch.equal(generate(model, ids, attention_mask=mask, max_new_tokens=4), want)
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["graph_break"]
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_cache_a_model_is_one_graph():
    model, ids = tiny_decoder("llama"), prompt()
    want = model(ids, use_cache=False).logits
    install_kv_cache(model, both_of(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generate_equals_a_manual_loop(family):
    model, ids = tiny_decoder(family), prompt()
    install_kv_cache(model, both_of(model))
    cache, text, new = None, ids, ids
    for _ in range(10):
        output = model(new, past_key_values=cache)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        text = torch.cat((text, new), 1)
    assert torch.equal(generate(model, ids), text)


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_and_chunked_generate_equal_the_plain_one(family):
    model, assistant, ids = tiny_decoder(family), tiny_decoder(family), prompt(batch=1)
    for name, parameter in assistant.named_parameters():  # much like the model: some candidates are accepted
        parameter.copy_(model.get_parameter(name) + 0.02 * torch.randn_like(parameter))
    install_kv_cache(model, both_of(model))
    install_kv_cache(assistant, both_of(assistant))
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, assistant_model=assistant), expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sink_tokens", [0, 1, 2])
@pytest.mark.parametrize("centred", [False, True])
def test_left_padding_changes_nothing(family, sink_tokens, centred):
    """The sink is each row's first real token: rows of a padded batch get the logits they get alone."""
    model, ids = tiny_decoder(family), prompt(batch=3, tokens=12)
    means = cache_means(model, prompt(tokens=20))._asdict() if centred else {}
    install_kv_cache(model, CacheSpec(4, rotate=centred, sink_tokens=sink_tokens, **means))
    padding = [0, 5, 9]
    mask = torch.ones_like(ids)
    for row, length in enumerate(padding):
        mask[row, :length] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for pieces in ((12,), (4, 4, 1, 3)):  # in the second, row 2 begins with two calls of padding only
        cache, logits, end = None, [], 0
        for piece, position in zip(ids.split(pieces, 1), positions.split(pieces, 1)):
            end += piece.shape[1]
            output = model(piece, attention_mask=mask[:, :end], position_ids=position, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        logits = torch.cat(logits, 1)
        for row, length in enumerate(padding):
            alone = model(ids[row : row + 1, length:]).logits
            torch.testing.assert_close(logits[row : row + 1, length:], alone, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
def test_left_padded_generate(family, options):
    model, ids = tiny_decoder(family), prompt(batch=2, tokens=8)
    install_kv_cache(model, both_of(model))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    together = generate(model, ids, attention_mask=mask, **options)
    assert torch.equal(together[:1], generate(model, ids[:1], **options))
    assert torch.equal(together[1:, 5:], generate(model, ids[1:, 5:], **options))


def test_cache_reuse_crop_and_reset():
    model, ids = tiny_decoder("llama"), prompt(tokens=16)
    install_kv_cache(model, both_of(model))
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    first = generate(model, ids[:, :6], past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == 9
    cache.crop(-4)  # back to the prompt without its last token
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:], **CLOSE)
    cache.reset()
    assert torch.equal(generate(model, ids[:, :6], past_key_values=cache, max_new_tokens=4), first)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, **CLOSE)


def test_a_longer_conversation_continues_where_it_stopped():
    model, ids = tiny_decoder("mistral"), prompt(batch=1)
    install_kv_cache(model, both_of(model))
    cache = DynamicCache(config=model.config)
    answer = generate(model, ids, past_key_values=cache)
    longer = torch.cat((answer, prompt(batch=1, tokens=3)), 1)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))


class _Elsewhere(torch.Tensor):
    """A tensor that says it lies on another device, and cannot be used until it is brought back."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="meta")
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        if func is torch.ops.aten._to_copy.default:
            return args[0].here
        raise AssertionError(f"{func} of an offloaded tensor")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_cache_is_quantized_too(family, monkeypatch):
    """The host's streams need a GPU; here what a layer moves away cannot be used until it is moved back."""
    model, ids = tiny_decoder(family), prompt()
    exact = generate(model, ids)
    install_kv_cache(model, both_of(model))
    wanted = generate(model, ids)
    moved = []

    def offload(layer, only=None):  # noqa: ARG001
        if layer.is_initialized:
            moved.append(layer)
            layer.keys, layer.values = _Elsewhere(layer.keys), _Elsewhere(layer.values)
            for store in layer.stores:
                store.exact = _Elsewhere(store.exact)

    monkeypatch.setattr(FreeActCacheLayer, "offload", offload)
    cache = DynamicCache(config=model.config)
    update = type(cache).update

    def with_offloading(self, keys, values, index, *args, **kwargs):
        layer = self.layers[index]
        if isinstance(layer, FreeActCacheLayer):
            layer.prefetch()
        found = update(self, keys, values, index, *args, **kwargs)
        if isinstance(layer, FreeActCacheLayer):
            layer.offload()
        return found

    monkeypatch.setattr(type(cache), "update", with_offloading)
    found = generate(model, ids, past_key_values=cache)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, exact)
    assert moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("slow", [False, True])
def test_an_offloaded_cache_on_a_gpu(implementation, slow):
    """Also where the GPU is far behind: what is copied to the CPU must be there before it is copied back."""
    model, ids = tiny_decoder("llama").to("cuda", torch.bfloat16), prompt().cuda()
    model.set_attn_implementation(implementation)
    install_kv_cache(model, both_of(model))
    wanted = generate(model, ids)
    for layer in model.model.layers if slow else ():
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(2_000_000))
    for _ in range(3):
        assert torch.equal(generate(model, ids, cache_implementation="offloaded"), wanted)
