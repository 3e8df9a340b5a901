"""The quantized cache through its kernels: layers, attention functions and generation, on the GPU or in the interpreter."""

from functools import partialmethod

import pytest
import torch
from transformers import DynamicCache

from optimum_freeact.kernels import kv_dispatch, kv_self_check
from optimum_freeact.kernels.kv_dispatch import kv_obstacle
from optimum_freeact.modules import kv_layer
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_layer import FreeActCacheLayer
from optimum_freeact.modules.kv_lazy import PackedStates
from optimum_freeact.modules.kv_means import cache_means
from optimum_freeact.modules.kv_store import CacheSpec
from tests.helpers.quantized import distance
from tests.helpers.tiny_models import sample_ids, tiny


@pytest.fixture
def kernels(device, monkeypatch):
    """Kernels serve on this device, as they do on a GPU."""
    monkeypatch.setattr(kv_layer, "kv_obstacle", lambda where, bits, dtype, size, rotated: kv_obstacle(
        torch.device("cuda"), bits, dtype, size, rotated
    ))  # fmt: skip
    if device == "cpu":
        monkeypatch.setattr(kv_dispatch, "triton_obstacle", lambda index: None)
        monkeypatch.setattr(kv_self_check, "cache_obstacle", lambda index, rotated: None)
    else:  # compared with torch here, not where a test counts or replaces them
        assert [kv_self_check.cache_obstacle(None, rotated) for rotated in (False, True)] == [None, None]
    return device


def a_spec(kind: str, heads: int = 2, size: int = 32) -> CacheSpec:
    if kind == "rotate":
        return CacheSpec(4, rotate=True)
    means = [torch.randn(heads, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    frequencies = 100.0 ** -(torch.arange(size // 2).double() / (size // 2))
    values = None if kind == "rotate, keys' means" else means[1:]
    rotate = kind != "means"
    return CacheSpec(4, rotate, key_mean=means[:1], value_mean=values, key_frequencies=[frequencies])


def steps(batch, lengths, heads=2, size=32, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    for length in lengths:
        yield tuple(
            torch.randn(batch, heads, length, size, generator=generator).to(dtype).to(device) for _ in range(2)
        )


@pytest.mark.parametrize("kind", ["rotate", "means", "rotate, means", "rotate, keys' means"])
def test_a_layer_holds_what_torch_would_hold(kind, kernels):
    ours, plain = (FreeActCacheLayer(a_spec(kind)) for _ in range(2))
    for layer in (ours, plain):
        layer.set_start(torch.tensor([0, 2]))
    for number, states in enumerate(steps(2, [5, 1, 1, 3, 1], device=kernels)):
        got = ours.update(*states)
        plain.obstacle = "test"
        if not plain.is_initialized:
            plain.lazy_initialization(*states)
            plain.obstacle = "test"
        want = plain.update(*states)
        assert ours.obstacle is None
        assert all(isinstance(state, PackedStates) for state in got) == (states[0].shape[2] == 1)
        for a, b in zip(got, want):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert distance(a + 0, b) < 0.02, number  # codes on an edge may fall to the other side
    ours.crop(-4)
    plain.crop(-4)
    for states in steps(2, [1], device=kernels):
        assert distance(ours.update(*states)[0] + 0, plain.update(*states)[0]) < 0.02
    ours.reorder_cache(torch.tensor([1, 1], device=kernels))
    plain.reorder_cache(torch.tensor([1, 1], device=kernels))
    for states in steps(2, [1, 1], device=kernels):
        assert distance(ours.update(*states)[1] + 0, plain.update(*states)[1]) < 0.02
    assert ours.keys.shape == plain.keys.shape
    assert ours.nbytes() == plain.nbytes()


@pytest.mark.parametrize(
    ("kind", "heads", "grouped"), [("rotate", 2, False), ("means", 6, True), ("rotate, means", 4, True)]
)
def test_attention_reads_packed_rows(kind, heads, grouped, kernels, monkeypatch):
    from optimum_freeact.kernels import kv_attend_triton

    layer, calls, attend = FreeActCacheLayer(a_spec(kind)), [], kv_attend_triton.attend
    monkeypatch.setattr(kv_attend_triton, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    for states in steps(2, [20, 1], device=kernels):  # the kernels' own tests have longer ones
        keys, values = layer.update(*states)
    query = torch.randn(2, heads, 1, 32, dtype=torch.bfloat16, device=kernels)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    got = sdpa(query, keys, values, enable_gqa=grouped)
    assert len(calls) == 1
    k, v = layer.states()
    assert not isinstance(k, PackedStates)
    want = sdpa(query.double(), k.double(), v.double(), enable_gqa=grouped)
    plain = sdpa(query, k, v, enable_gqa=grouped)
    assert distance(got, want) < max(2 * distance(plain, want), 1e-2)
    # what the kernel does not do is done on decoded states
    mask = torch.ones(2, heads, 1, 21, dtype=torch.bool, device=kernels)
    mask[:, 0, :, 3] = False
    masked = sdpa(query, keys, values, attn_mask=mask, enable_gqa=grouped)
    assert len(calls) == 1
    assert torch.equal(masked, sdpa(query, k, v, attn_mask=mask, enable_gqa=grouped))
    assert torch.equal(torch.matmul(keys, values.mT), torch.matmul(k, v.mT))


@pytest.mark.parametrize(
    ("attention", "padded", "rotate"),
    [("sdpa", False, False), ("sdpa", True, False), ("eager", True, False), ("sdpa", True, True)],
)
def test_generation_is_that_of_the_unpacked_cache(attention, padded, rotate, kernels, monkeypatch):
    from optimum_freeact.kernels import kv_attend_triton

    calls, attend = [], kv_attend_triton.attend
    monkeypatch.setattr(kv_attend_triton, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    model = tiny("qwen2", num_hidden_layers=2).to(kernels)  # the interpreter takes seconds a layer
    means = cache_means(model, sample_ids(4, 20, seed=2).to(kernels))
    model = model.bfloat16()
    model.set_attn_implementation(attention)
    ids = sample_ids(2, 6, seed=3).to(kernels)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0 if padded else 1
    install_kv_cache(model, CacheSpec(4, rotate, **means._asdict()))
    scores = []
    for serves in (True, False):
        if not serves:
            monkeypatch.setattr(kv_layer, "kv_obstacle", lambda *args: "test")
        before = len(calls)
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            found.append(
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
            )
            for token in range(2):
                mask_now = torch.cat((mask, torch.ones_like(mask[:, : token + 1])), 1)
                new = sample_ids(2, 1, seed=token).to(kernels)
                out = model(input_ids=new, attention_mask=mask_now, past_key_values=cache, use_cache=True)
                found.append(out.logits[:, -1])
        scores.append(torch.stack(found))
        ran, steps_taken = len(calls) - before, 2 * model.config.num_hidden_layers
        if not serves or attention == "eager":
            assert ran == 0
        elif not padded:
            assert ran == steps_taken
        else:  # some versions of transformers repeat the key heads where there is a mask: then all is decoded
            assert ran in (0, steps_taken)
    assert distance(*scores) < 0.05


def always_unpacked(layer, update, _, *args, **kwargs):
    return update(layer, True, *args, **kwargs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_attention_gets_states_unpacked(kernels, monkeypatch):
    """Kernels write what a compiled model caches, and its attention, which cannot read rows, is given states."""
    from optimum_freeact.kernels import kv_attend_triton, kv_write_triton

    written, write = [], kv_write_triton.write_rows
    monkeypatch.setattr(kv_write_triton, "write_rows", lambda *args: written.append(1) or write(*args))
    monkeypatch.setattr(kv_attend_triton, "attend", None)
    model = tiny("qwen2", num_hidden_layers=1).to(kernels)
    means = cache_means(model, sample_ids(4, 20, seed=2).to(kernels))
    install_kv_cache(model, CacheSpec(4, True, **means._asdict()))
    model = model.bfloat16()
    ids, found = sample_ids(1, 5, seed=3).to(kernels), []
    for run in (torch.compile(model, backend="eager"), model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            run(input_ids=ids, past_key_values=cache, use_cache=True)
            if run is model:  # what a compiled model asks for
                monkeypatch.setattr(
                    FreeActCacheLayer, "_update", partialmethod(always_unpacked, FreeActCacheLayer._update)
                )
            found.append(run(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits)
    assert len(written) == 2 * 2 * 2  # keys and values of a prompt and of a step, twice
    assert torch.equal(*found)


def test_beams_are_those_of_the_unpacked_cache(kernels, monkeypatch):
    """Rows of the cache are copied and put in another order between tokens."""
    model = tiny("qwen2", num_hidden_layers=1).to(kernels)
    means = cache_means(model, sample_ids(4, 20, seed=2).to(kernels))
    model = model.bfloat16()
    ids = sample_ids(2, 9, seed=3).to(kernels)
    install_kv_cache(model, CacheSpec(4, **means._asdict()))
    texts = []
    for obstacle in (None, "test"):
        monkeypatch.setattr(kv_layer, "kv_obstacle", lambda *args, told=obstacle: told)
        texts.append(model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0))
    assert texts[0].shape == (2, 12)
    if kernels == "cpu":  # elsewhere a code on an edge may fall to the other side, and another beam win
        assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 8}, "kv_bits=8"),
        ({"dtype": torch.float32}, "float32"),
        ({"size": 320}, "head_dim=320"),
        ({"device": torch.device("cpu")}, "'cpu'"),
    ],
)
def test_what_is_read_by_torch_is_told(change, reason, monkeypatch):
    monkeypatch.setattr(kv_dispatch, "triton_obstacle", lambda index: None)
    monkeypatch.setattr(kv_self_check, "cache_obstacle", lambda index, rotated: None)
    settings = {"device": torch.device("cuda"), "bits": 4, "dtype": torch.bfloat16, "size": 64, "rotated": True}
    assert kv_obstacle(**settings) is None
    assert reason in kv_obstacle(**{**settings, **change})
    monkeypatch.setenv("FREEACT_KERNELS", "torch")
    assert "FREEACT_KERNELS=torch" in kv_obstacle(**settings)
