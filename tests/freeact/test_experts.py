"""Quantized experts of mixture models: identities, calibration, files, and what is refused."""

import copy
import functools
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_freeact.calibration.experts import ExpertsFit, Routed
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.branch_rank import rank_of
from optimum_freeact.modules.experts import FreeActExperts, experts_obstacle, find_experts, plain_weights
from optimum_freeact.report.sizes import quantized_size
from optimum_freeact.type_state import TypeState
from tests.helpers import forked
from tests.helpers.quantized import distance, logits, quantized, reload, settings
from tests.helpers.tiny_models import EXPERTS, sample_ids, tiny


MIXTRAL = "0.block_sparse_moe.experts.gate_up_proj"  # as its checkpoints say
HIDDEN, INNER, N, TOKENS = 64, 32, 4, 200


class PlainExperts(nn.Module):
    """Experts as transformers lays them out, in any of its ways."""

    def __init__(self, transposed: bool = False, bias: bool = False, gated: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = N, transposed, bias, gated
        width = 2 * INNER if gated else INNER

        def make(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.1)

        first = (N, HIDDEN, width) if transposed else (N, width, HIDDEN)
        second = (N, INNER, HIDDEN) if transposed else (N, HIDDEN, INNER)
        self.register_parameter("gate_up_proj" if gated else "up_proj", make(*first))
        self.down_proj = make(*second)
        if bias:
            self.register_parameter("gate_up_proj_bias" if gated else "up_proj_bias", make(N, width))
            self.down_proj_bias = make(N, HIDDEN)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, first):
        gate, up = first.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for k, expert in enumerate(index[token].tolist()):
                if expert == self.num_experts:
                    continue
                (w1, b1), (w2, b2) = plain_weights(self, expert)
                y = nn.functional.linear(hidden[token], w1, b1)
                y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
                result[token] += weights[token, k] * nn.functional.linear(y, w2, b2)
        return result


def routed(skewed: bool = False):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator) * torch.exp(torch.randn(HIDDEN, generator=generator)) + 1
    types = torch.zeros(TOKENS, dtype=torch.long)
    types[::50] = 1
    scores = torch.rand(TOKENS, N, generator=generator)
    if skewed:
        scores[:, 3] = -1.0
    weights, index = scores.topk(2, dim=-1)
    return hidden, types, index, weights


def fitted(plain, skewed=False, **changes):
    config = FreeActConfig(
        **{"token_types": ["text", "sink"], "weight_group_size": 16, "activation_group_size": 16, **changes}
    )
    config.weight_dtype = "float64" if config.weight_bits == 16 else "float32"
    hidden, types, index, _ = routed(skewed)
    pairs = [
        [(w.detach().clone(), b if b is None else b.detach().clone()) for w, b in plain_weights(plain, e)]
        for e in range(N)
    ]
    state = TypeState()
    target = FreeActExperts(copy.deepcopy(plain), config, state, functools.partial(rank_of, config))
    fit = ExpertsFit("experts", target, [list(p) for p in zip(*pairs)], Routed(hidden, types, index), config)
    records = fit.closed_form(torch.Generator().manual_seed(2))
    target.prepare()
    state.types = types
    for module in (target.get_submodule(f"{name}_input") for name in target.names):
        module.prepare()
    return target, records


@pytest.mark.parametrize("centring", ["per_type", "none"])
@pytest.mark.parametrize("layout", [{}, {"transposed": True, "bias": True}, {"gated": False}], ids=str)
def test_without_rounding_it_is_the_plain_module(layout, centring):
    """Any map that calibration finds leaves the experts exact, whichever way they lie in memory."""
    plain = PlainExperts(**layout).double()
    changes = {"channel_scale": "closed_form"} if centring == "none" else {}
    ours, _ = fitted(plain, weight_bits=16, activation_bits=16, centring=centring, transform="kronecker", **changes)
    hidden, _, index, weights = routed()
    index[5, 0] = N  # no expert
    want = plain(hidden.double(), index, weights.double())
    assert distance(ours(hidden.double(), index, weights.double()), want) < 1e-6  # biases and maps are kept in float32


def test_types_follow_their_tokens_to_the_experts():
    """Each token is centred by its own type's mean, in whatever order the experts get them."""
    plain = PlainExperts()
    ours, _ = fitted(plain)
    hidden, types, index, weights = routed()
    whole = ours(hidden, index, weights)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    ours.state.types = types[order]
    assert torch.allclose(ours(hidden[order], index[order], weights[order]), whole[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.state.types, types[order])  # put back
    ours.state.types = torch.zeros_like(types)
    assert distance(ours(hidden, index, weights)[types == 1], whole[types == 1]) > 1e-3


def test_rounding_errs_little_and_gptq_less():
    plain = PlainExperts()
    hidden, _, index, weights = routed()
    want = plain(hidden, index, weights)
    errors = {
        name: distance(fitted(plain, **changes)[0](hidden, index, weights), want)
        for name, changes in {"gptq": {}, "rtn": {"rounding": "rtn"}, "bare": {"preset": "rtn"}}.items()
    }
    assert errors["gptq"] < errors["rtn"] < errors["bare"]
    assert errors["gptq"] < 0.15


def test_an_expert_that_no_token_reaches_is_rounded_as_all_would_have_it():
    plain = PlainExperts()
    ours, records = fitted(plain, skewed=True)
    hidden, _, _, weights = routed()
    index = torch.full((TOKENS, 2), N)
    index[:, 0] = 3
    assert distance(ours(hidden, index, weights), plain(hidden, index, weights)) < 0.2
    assert [record.linears for record in records] == [["experts.gate_up_proj"], ["experts.down_proj"]]
    assert 0 < records[0].weight_error < records[0].activation_error < 0.1


@pytest.mark.parametrize("family", EXPERTS)
def test_models_are_quantized_saved_and_loaded(family, tmp_path):
    plain = tiny(family)
    model = quantized(family)
    found = [module for module in model.modules() if isinstance(module, FreeActExperts)]
    assert len(found) == 2
    assert all(module.gate_up_proj.dtype == torch.uint8 and module.gate_up_proj.dim() == 4 for module in found)
    before = logits(model)
    assert 0 < distance(before, logits(plain)) < 0.5
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert (
        names[next(n for n in names if n.endswith("0.mlp.experts.gate_up_proj") or n.endswith(MIXTRAL))].dtype
        == torch.uint8
    )
    assert not any(".experts.0." in name for name in names)
    again = reload(tmp_path)
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(copy.deepcopy(again)), before)
    ids = sample_ids(1, 5, seed=1)
    text = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(text, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_resumed_calibration_is_the_same(tmp_path):
    first = quantized("mixtral", resume_dir=str(tmp_path))
    again = quantized("mixtral", resume_dir=str(tmp_path))
    assert torch.equal(logits(first), logits(again))


@pytest.mark.parametrize("family", EXPERTS)
def test_plain_experts_come_back(family, tmp_path):
    plain, model = tiny(family), quantized(family)
    before = logits(model)
    model.dequantize()
    kinds = {type(module).__name__ for module in plain.modules()}
    assert {type(module).__name__ for module in model.modules()} == kinds
    assert distance(logits(model), before) < 0.5
    assert distance(logits(model), logits(plain)) < 0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_memory_at_real_widths():
    """Stored bytes of experts of Qwen3-30B-A3B's sizes (a few of them), scales and inputs included, over bfloat16."""
    with torch.device("meta"):
        plain = PlainExperts()
        plain.num_experts = 32
        plain.gate_up_proj = nn.Parameter(torch.empty(32, 1536, 2048))
        plain.down_proj = nn.Parameter(torch.empty(32, 2048, 768))
        config = FreeActConfig(token_types=["text", "sink"])
        model = nn.ModuleList([FreeActExperts(plain, config, TypeState(), functools.partial(rank_of, config))])
    size = quantized_size(model)
    assert size.n_linears == 64
    assert size.n_weights == 32 * (1536 * 2048 + 2048 * 768)
    assert size.ratio < 0.30


def test_a_program_without_the_package_does_not_take_them_for_weights(tmp_path):
    quantized("mixtral").save_pretrained(tmp_path)
    code = (
        "import json, sys\nfrom transformers import AutoConfig, MixtralForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\ndel config.quantization_config\n"
        "try:\n    MixtralForCausalLM.from_pretrained(sys.argv[1], config=config)\n    print(json.dumps('loaded'))\n"
        "except Exception as error:\n    print(json.dumps(str(error)))"
    )
    run = forked.run(str(tmp_path), code=code)
    assert "loaded" not in run.stdout.splitlines()[-1]
    assert "mismatch" in run.stdout + run.stderr


def test_damage_is_named(tmp_path):
    quantized("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.down_proj_qscale"))
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors.*down_proj_qscale"):
        reload(tmp_path)
    save_file({**tensors, name: tensors[name] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="down_proj_qscale.*NaN"):
        reload(tmp_path)
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    save_file({**tensors, name: tensors[name].float()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gate_up_proj"):
        reload(tmp_path)


def test_a_changed_config_is_refused(tmp_path):
    import json

    quantized("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["experts"] == {"*": ["mlp.experts"]}
    config["quantization_config"]["experts"] = {"*": ["mlp.gate"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="experts.*'mlp.gate'"):
        reload(tmp_path)


def test_weights_that_are_not_finite_are_named():
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    from optimum_freeact.api import quantize

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*NaN"):
        quantize(model, settings())


def test_experts_can_be_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        model = quantized("mixtral", modules_to_not_convert=["experts"])
    assert not any(isinstance(module, FreeActExperts) for module in model.modules())
    assert "stay in full precision" in caplog.text
    assert model.config.quantization_config.experts is None


def test_what_is_not_quantized_is_said():
    assert experts_obstacle(PlainExperts()) is None
    odd = PlainExperts()
    odd.extra = nn.Parameter(torch.zeros(2, 2, 2))
    assert "extra" in experts_obstacle(odd)
    normalised = PlainExperts()
    normalised.has_post_expert_norm = True
    assert "normalises" in experts_obstacle(normalised)
    unknown = PlainExperts()
    del unknown.is_transposed
    assert "how its experts lie" in experts_obstacle(unknown)
    assert find_experts(nn.ModuleDict({"a": PlainExperts(), "b": odd})).keys() == {"a"}


def test_one_gradient_reaches_the_inputs():
    ours, _ = fitted(PlainExperts())
    hidden, _, index, weights = routed()
    hidden.requires_grad_(True)
    ours(hidden, index, weights).square().sum().backward()
    assert hidden.grad.isfinite().all()
    assert hidden.grad.abs().sum() > 0


def test_auto_device_maps_find_them(tmp_path):
    quantized("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, attn_implementation="eager")
    assert torch.equal(logits(model), logits(reload(tmp_path)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("preset", ["freeact", "freeact-fast"])
def test_experts_compute_the_same_on_a_gpu(preset):
    model = quantized("mixtral", preset=preset)
    before = logits(model)
    after = logits(model.to("cuda"), sample_ids(2, 12, seed=5).cuda()).cpu()
    assert distance(after, before) < 0.1 * distance(before, logits(tiny("mixtral")))
    low = logits(model.bfloat16(), sample_ids(2, 12, seed=5).cuda()).cpu()
    assert distance(low, before) < distance(before, logits(tiny("mixtral")))
