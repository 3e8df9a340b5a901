"""The sink is the first real token of each sequence, however the tokens arrive; and each model knows only its own."""

import copy
import threading

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from optimum_freeact.token_types import TokenTyper, sink_mask
from optimum_freeact.type_hooks import install_typer
from optimum_freeact.type_state import TypeState, attach_state
from tests.helpers.quantized import logits, quantized
from tests.helpers.tiny_models import sample_ids, tiny


IDS = torch.arange(12).view(2, 6)


def firsts(**arguments):
    return sink_mask({"input_ids": IDS, **arguments}).int().tolist()


def test_without_a_mask_it_is_the_first_position():
    assert firsts() == [[1, 0, 0, 0, 0, 0]] * 2
    assert firsts(input_ids=None, inputs_embeds=torch.zeros(2, 6, 8)) == [[1, 0, 0, 0, 0, 0]] * 2
    assert sink_mask({"attention_mask": torch.ones(2, 6)}) is None


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float])
def test_padding_on_either_side(kind):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).to(kind)
    assert firsts(attention_mask=mask) == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert firsts(attention_mask=torch.zeros(2, 6).to(kind)) == [[0] * 6] * 2


def test_packed_sequences_start_again():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert firsts(position_ids=positions) == [[1, 0, 0, 1, 0, 1]] * 2
    assert firsts(position_ids=positions, attention_mask=torch.ones(2, 6)) == [[1, 0, 0, 1, 0, 1]] * 2
    padded = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(2, 6)
    assert firsts(position_ids=positions, attention_mask=padded) == [[1, 0, 0, 1, 0, 0]] * 2


def test_positions_of_left_padding_are_no_starts():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    for filler in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        assert firsts(attention_mask=mask, position_ids=positions) == [[0, 0, 1, 0, 0, 0]] * 2


def test_positions_of_other_shapes_are_ignored():
    assert firsts(position_ids=torch.arange(6).expand(3, 2, 6)) == [[1, 0, 0, 0, 0, 0]] * 2


def test_packed_sequences_with_places_in_pictures():
    """Four rows of positions, the text's first, as transformers' Qwen-VL models take packed sequences."""
    text = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    places = torch.zeros(3, 2, 6, dtype=torch.long)
    assert firsts(position_ids=torch.cat((text[None], places))) == [[1, 0, 0, 1, 0, 0]] * 2


@pytest.mark.parametrize("static", [False, True])
def test_cached_decoding_has_no_new_first_token(static):
    model = tiny("llama")
    cache = StaticCache(model.config, max_cache_len=20) if static else DynamicCache()
    assert firsts(past_key_values=cache) == [[1, 0, 0, 0, 0, 0]] * 2
    with torch.no_grad():
        model(input_ids=sample_ids(2, 5), past_key_values=cache)
    assert firsts(past_key_values=cache) == [[0] * 6] * 2
    late = torch.tensor([[0] * 7 + [1] * 4, [1] * 11])  # row 0 begins only now
    assert firsts(past_key_values=cache, attention_mask=late) == [[0, 0, 1, 0, 0, 0], [0] * 6]


def test_a_mask_shorter_than_the_tokens_is_left_to_the_model():
    assert firsts(attention_mask=torch.ones(2, 3)) == [[1, 0, 0, 0, 0, 0]] * 2


def test_names_decide_whether_there_are_types():
    assert TokenTyper(["text"])({"input_ids": IDS}) is None
    types = TokenTyper(["text", "sink"])({"input_ids": IDS})
    assert types.dtype == torch.int64
    assert types.tolist() == firsts()
    for names in ([], ["sink"], "text", ["text", "text"], ["text", "nonsense"], ["text", "image"]):
        with pytest.raises(ValueError, match="token_types"):
            TokenTyper(names)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt"])
def test_positional_arguments_are_understood(family):
    """The mask is the decoder's second argument."""
    model = tiny(family)
    state, decoder = attach_state(model), model.get_decoder()
    install_typer(decoder, TokenTyper(["text", "sink"]), state)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        decoder(sample_ids(2, 6), mask)
    assert state.types.tolist() == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_types_fit_flattened_tokens_or_nothing():
    state = TypeState()
    assert state.of(torch.zeros(2, 6, 4)) is None
    state.types = torch.arange(12).view(2, 6)
    assert torch.equal(state.of(torch.zeros(2, 6, 4)), state.types)
    assert torch.equal(state.of(torch.zeros(12, 4)), state.types.flatten())
    assert state.of(torch.zeros(2, 5, 4)) is None


# --- what it does to a quantized model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return quantized("llama")


def test_left_padded_rows_get_the_logits_they_get_alone(model):
    ids, mask = sample_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[0, 4], ids[0, :4], mask[0, :4] = 1, 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(both[:1, 4:], logits(model, ids[:1, 4:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], logits(model, ids[1:]), rtol=1e-4, atol=1e-4)


def test_packed_sequences_get_the_types_they_get_alone(model):
    """Attention sees the whole pack (no mask is given here), so only the first linears' outputs are compared."""
    a, b = sample_ids(1, 7, seed=1), sample_ids(1, 5, seed=2)
    seen = {}
    linear = model.model.layers[0].self_attn.q_proj
    handle = linear.register_forward_hook(lambda _m, _a, output: seen.update(y=output))
    try:
        alone = []
        for ids in (a, b):
            logits(model, ids)
            alone.append(seen["y"])
        positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
        logits(model, torch.cat((a, b), 1), position_ids=positions)
    finally:
        handle.remove()
    torch.testing.assert_close(seen["y"], torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_the_sink_type_is_used(model):
    """Types change the result: without the typing hook the first token would be quantized as text."""
    bare = copy.deepcopy(model)
    expected = logits(bare)
    for hook in bare.__dict__.pop("_freeact_hooks"):
        hook.remove()
    bare._freeact_state.types = None
    assert not torch.allclose(logits(bare), expected, atol=1e-3)


def test_decoding_token_by_token_equals_the_whole(model):
    ids = sample_ids(2, 10)
    cache, parts = DynamicCache(), []
    for piece in ids.split([4, 1, 3, 1, 1], 1):
        parts.append(logits(model, piece, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_embeddings_instead_of_ids(model):
    ids = sample_ids(2, 10)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, logits(model, ids))


def test_a_mixed_input_equals_separate_ones_bit_by_bit(model):
    """A row's result depends on the row and its type alone; between shapes BLAS may differ in the last bits."""
    linear = model.model.layers[0].mlp.up_proj
    state, x = model._freeact_state, torch.randn(8, 64)
    types = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0])
    state.types = types
    mixed = linear(x.clone())
    for kind in (0, 1):
        state.types = torch.full((8,), kind)
        assert torch.equal(linear(x.clone())[types == kind], mixed[types == kind])
        assert not torch.equal(linear(x.clone())[types != kind], mixed[types != kind])
        state.types = types[types == kind]
        torch.testing.assert_close(linear(x[types == kind]), mixed[types == kind], rtol=1e-5, atol=1e-5)
    state.types = None


def test_two_models_in_turn_keep_their_types_apart(model):
    other = quantized("llama", {"seed": 3})
    ids, longer = sample_ids(2, 12), sample_ids(3, 9, seed=9)
    expected, theirs = logits(model, ids), logits(other, longer)
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(other, longer), theirs)
    assert model._freeact_state is not other._freeact_state


def test_threads_keep_their_types_apart(model):
    """Same model, same shape, but one thread's rows are left padded: types of one must not reach the other."""
    torch.set_num_threads(1)
    ids, mask = sample_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[:, :5] = 0
    inputs = [{"attention_mask": torch.ones_like(mask)}, {"attention_mask": mask}]
    expected = [logits(model, ids, **each) for each in inputs]
    assert not torch.equal(*expected)
    wrong, start = [], threading.Barrier(2)

    def work(kind):
        start.wait()
        for _ in range(15):
            if not torch.equal(logits(model, ids, **inputs[kind]), expected[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
