"""Types come from what the model's config names, or from the user's rules; what cannot work is refused by name."""

import copy
import json
import logging
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_freeact.api import quantize
from optimum_freeact.config import FreeActConfig
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_rules import known_rules, resolve
from tests.helpers.quantized import logits, quantized, reload, settings
from tests.helpers.tiny_models import sample_ids, tiny


MASK = 103
IDS = torch.tensor([[1, 7, MASK, 9, MASK, MASK], [1, MASK, 8, 8, 8, 9]])


def masked_llama(**config):
    """A Llama whose config names a mask token, as those of diffusion language models do."""
    model = tiny("llama")
    model.config.mask_token_id = MASK
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def types_of(model, ids=IDS, **arguments):
    logits(model, ids, **arguments)
    return model._freeact_state.types.tolist()


def with_rules(**changes):
    return quantize(tiny("llama"), settings(**changes))


# --- what a config tells ---------------------------------------------------------------------------------------------


def test_a_config_without_placeholders_has_text_and_sink():
    assert resolve(tiny("llama"), ["text", "sink", "auto"], None, None) == (["text", "sink"], {})
    assert quantized("llama").hf_quantizer.quantization_config.token_types == ["text", "sink"]


def test_a_mask_token_is_found_and_recorded(tmp_path):
    model = quantize(masked_llama(), settings())
    config = model.hf_quantizer.quantization_config
    assert config.token_types == ["text", "sink", "mask"]
    assert config.type_rules == {"mask": {"ids": [MASK], "field": "mask_token_id"}}
    assert types_of(model) == [[1, 0, 2, 0, 2, 2], [1, 2, 0, 0, 0, 0]]
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert again._freeact_state.types.tolist() == [[1, 0, 2, 0, 2, 2], [1, 2, 0, 0, 0, 0]]


def test_a_config_that_changed_after_saving_is_refused(tmp_path):
    quantize(masked_llama(), settings()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "mask_token_id": 50}))
    with pytest.raises(ValueError, match=r"mask tokens \[103\].*mask_token_id=50"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nested_configs_and_old_names_are_read():
    model = masked_llama(image_token_index=5, audio_token_id=None)
    assert {name: rule["ids"] for name, rule in known_rules(model).items()} == {"mask": [MASK], "image": [5]}
    model.config.text_config = copy.deepcopy(model.config)
    model.config.mask_token_id = None
    assert known_rules(model)["mask"] == {"ids": [MASK], "field": "mask_token_id"}


def test_a_wanted_type_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"'mask'.*mask_token_id.*type_rules=\{'mask'"):
        quantize(tiny("llama"), settings(token_types=["text", "mask"]))


# --- what the user says ----------------------------------------------------------------------------------------------


def test_ids_by_the_user_go_before_the_configs():
    model = quantize(
        masked_llama(), settings(token_types=["text", "mask", "nine"], type_rules={"mask": [7], "nine": [9]})
    )
    assert types_of(model) == [[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 2]]


def test_a_column_of_the_forward():
    rules = {"code": {"column": "kinds", "values": [3, 4]}}
    typer = TokenTyper(["text", "sink", "code"], rules)
    kinds = torch.tensor([[0, 3, 0, 4, 1, 0]] * 2)
    expected = [[1, 2, 0, 2, 0, 0]] * 2
    assert typer({"input_ids": IDS, "kinds": kinds}).tolist() == expected
    longer = torch.cat((torch.full((2, 4), 3), kinds), 1)  # told about cached tokens too
    assert typer({"input_ids": IDS, "kinds": longer}).tolist() == expected
    with pytest.raises(ValueError, match="told by"):
        typer({"input_ids": IDS, "kinds": kinds[:, :3]})


def odd_ids(arguments):
    return (arguments["input_ids"] % 2) * 2


def test_a_callable_is_used_and_must_be_given_again(tmp_path):
    model = quantize(tiny("llama"), settings(token_types=["text", "sink", "odd"], typer=odd_ids))
    expected = [[1, 2, 2, 2, 2, 2], [1, 2, 0, 0, 0, 2]]
    assert types_of(model) == expected
    model.save_pretrained(tmp_path)
    assert "odd_ids" in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"callable .*odd_ids: load it with .*typer="):
        reload(tmp_path)
    again = reload(tmp_path, quantization_config=FreeActConfig(typer=odd_ids))
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert again._freeact_state.types.tolist() == expected


def test_a_callable_that_the_checkpoint_does_not_need_is_refused(tmp_path):
    quantized("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows its token types by itself"):
        reload(tmp_path, quantization_config=FreeActConfig(typer=odd_ids))


WRONG_ANSWERS = {
    "shape": (lambda a: torch.zeros(1, 3, dtype=torch.long), r"shape \(3, 24\).*int64 of \(1, 3\)"),
    "kind": (lambda a: torch.zeros(a["input_ids"].shape), r"shape \(3, 24\).*float32"),
    "list": (lambda a: [0], "gave list"),
    "high": (lambda a: torch.full(a["input_ids"].shape, 3), r"0\.\.2 \(text, sink, odd\).*3\.\.3"),
    "low": (lambda a: torch.full(a["input_ids"].shape, -1), r"gave -1\.\.-1"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_wrong_answers_of_a_callable_are_named(case):
    typer, message = WRONG_ANSWERS[case]
    with pytest.raises(ValueError, match=message):
        with_rules(token_types=["text", "sink", "odd"], typer=typer)


WRONG_RULES = [
    ({"token_types": ["text", "x"]}, "or have a rule"),
    ({"token_types": ["text"], "type_rules": {"x": [1]}}, r"rules for \['x'\]"),
    ({"token_types": ["text", "x"], "type_rules": {"x": []}}, "list of integers"),
    ({"token_types": ["text", "x"], "type_rules": {"x": [-1]}}, "list of integers"),
    ({"token_types": ["text", "x"], "type_rules": {"x": 5}}, "must be a list of token ids"),
    ({"token_types": ["text", "x"], "type_rules": {"x": {"column": "c"}}}, "must be a list of token ids"),
    ({"token_types": ["text", "x"], "type_rules": [1]}, "must be a dictionary"),
    ({"token_types": ["text", "x"], "type_rules": {"x": [104]}}, r"ids \[104\].*104 entries"),
    ({"typer": 5}, "must be a callable"),
    ({"typer": odd_ids}, "decides about every token"),
    ({"exclusive_share": 0.8}, r"\[0, 0.5\]"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_RULES, ids=[str(i) for i in range(len(WRONG_RULES))])
def test_wrong_rules_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        with_rules(**changes)


def test_a_type_absent_from_calibration_shares_the_statistics_of_all(caplog):
    with caplog.at_level(logging.WARNING):
        model = with_rules(token_types=["text", "sink", "rare"], type_rules={"rare": [102]})
    assert "['rare']" in caplog.text
    source = model.model.layers[0].self_attn.q_proj.source
    everything = source.mean[2].float()
    assert not torch.equal(everything, source.mean[0].float())
    assert torch.isfinite(logits(model, torch.full((1, 6), 102))).all()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with_rules(token_types=["text", "sink", "often"], type_rules={"often": list(range(6, 50))})
    assert "calibration token" not in caplog.text


# --- what types do ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked():
    return quantize(masked_llama(), settings())


def test_a_mixed_batch_gives_each_token_what_its_type_alone_gives(masked):
    """Bit by bit: a row's result depends on the row and its type only (same shapes, hence the same kernels)."""
    linear, state = masked.model.layers[0].mlp.up_proj, masked._freeact_state
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    types = torch.arange(9) % 3
    state.types = types
    mixed = linear(x.clone())
    for kind in range(3):
        state.types = torch.full((9,), kind)
        alone = linear(x.clone())
        assert torch.equal(alone[types == kind], mixed[types == kind])
        assert not torch.equal(alone[types != kind], mixed[types != kind])
    state.types = None


def test_a_type_has_a_clip_of_its_own(masked):
    """Within one token's range nothing else differs: another type's clip, other codes; its own, the same bits."""
    source = copy.deepcopy(masked.model.layers[0].mlp.up_proj.source)
    assert source.clip.shape == (3,)
    source.clip.fill_(1.0)
    source.clip[2] = 0.5
    source.mean.zero_()
    source.prepare()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def rounded(kind):
        source.state.types = torch.full((4,), kind)
        told = source(x.clone())
        source.state.types = None
        return told

    text, sink, mask = (rounded(kind) for kind in range(3))
    assert torch.equal(text.codes, sink.codes)
    assert not torch.equal(text.codes, mask.codes)


def test_a_token_changes_type_when_it_is_unmasked(masked):
    ids = IDS.clone()
    assert types_of(masked, ids)[0] == [1, 0, 2, 0, 2, 2]
    ids[0, 2] = 50
    assert types_of(masked, ids)[0] == [1, 0, 0, 0, 2, 2]


def test_decoding_with_a_cache_types_the_new_tokens_only(masked):
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    assert types_of(masked, IDS[:, :4], past_key_values=cache) == [[1, 0, 2, 0], [1, 2, 0, 0]]
    assert types_of(masked, IDS[:, 4:], past_key_values=cache) == [[2, 2], [0, 0]]


def test_left_padding_and_packing(masked):
    ids = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDS), 1)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    assert types_of(masked, ids, attention_mask=mask) == [[0, 0, 1, 0, 2, 0, 2, 2], [0, 0, 1, 2, 0, 0, 0, 0]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    assert types_of(masked, position_ids=positions) == [[1, 0, 2, 1, 2, 2], [1, 2, 0, 1, 0, 0]]


def test_gradient_checkpointing_recomputes_with_the_types_of_its_forward(masked):
    model = copy.deepcopy(masked)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        model.get_input_embeddings().register_forward_hook(lambda *_, e=embedded: e)
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().sum() > 0


def test_threads_keep_their_types_apart(masked):
    torch.set_num_threads(1)
    other = IDS.roll(1, 1)
    expected = [logits(masked, ids) for ids in (IDS, other)]
    wrong, start = [], threading.Barrier(2)

    def work(kind):
        start.wait()
        for _ in range(15):
            if not torch.equal(logits(masked, (IDS, other)[kind]), expected[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_models_with_other_types_in_turn(masked):
    plain = quantized("llama")
    ids = sample_ids(2, 6, seed=4)
    expected, theirs = logits(masked, IDS), logits(plain, ids)
    for _ in range(2):
        assert torch.equal(logits(masked, IDS), expected)
        assert torch.equal(logits(plain, ids), theirs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(masked):
    """Dynamo traces the typing without a graph break (the backend runs the graph as it is)."""
    torch._dynamo.reset()
    compiled = torch.compile(masked, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, logits(masked, IDS, use_cache=False), rtol=1e-5, atol=1e-5)
