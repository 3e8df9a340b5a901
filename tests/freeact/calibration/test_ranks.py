"""Two processes calibrate as one does, and a block's memory stays below what the formula says."""

import json

import pytest
import torch
import torch.distributed as dist

from optimum_freeact.api import quantize
from optimum_freeact.calibration.ranks import Ranks, block_bytes
from optimum_freeact.modules.layout import block_linears
from optimum_freeact.moments import Moments
from tests.helpers import forked
from tests.helpers.peak import PeakBytes
from tests.helpers.quantized import distance, logits, settings
from tests.helpers.tiny_models import tiny


def process(folder: str, changes: dict) -> None:
    """What one of two does."""
    torch.set_num_threads(1)
    model = quantize(tiny("llama"), settings(across_processes=True, **changes))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = [[entry.linears for entry in record.inputs] for record in model._freeact_records]
    torch.save((state, logits(model), records), f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture
def together(tmp_path):
    def run(**changes):
        code = "import json, sys\nfrom tests.freeact.calibration.test_ranks import process\n"
        code += "process(sys.argv[1], json.loads(sys.argv[2]))"
        done = forked.together(forked.ranks(2), str(tmp_path), json.dumps(changes), code=code)
        assert [each.returncode for each in done] == [0, 0], "".join(each.stderr[-3000:] for each in done)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"attention_compensation": True}, marks=pytest.mark.slow),
    ],
    ids=["split", "whole"],
)
def test_two_processes_calibrate_as_one(together, changes):
    alone = quantize(tiny("llama"), settings(**changes))
    (first, first_logits, records), (second, second_logits, _) = together(**changes)
    assert first.keys() == second.keys() == alone.state_dict().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first_logits, second_logits)
    assert records == [[entry.linears for entry in record.inputs] for record in alone._freeact_records]
    # another order of sums moves a code here and there, after which the second block of a tiny model goes its own way;
    # another half of the samples would move most codes of the first block too
    codes = {n: t for n, t in alone.state_dict().items() if t.dtype == torch.uint8 and ".0." in n}
    assert torch.stack([(first[name] == tensor).float().mean() for name, tensor in codes.items()]).mean() > 0.9
    exact = logits(tiny("llama"))
    assert distance(first_logits, exact) < 1.3 * distance(logits(alone), exact)


def test_moments_about_different_centres_add_up(monkeypatch):
    """The sums that a second process would send are played back: the result equals the moments of all rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) + 30
    types = torch.arange(400) % 2
    parts = [Moments(6, 2, torch.device("cpu")) for _ in range(3)]
    for moments, rows in zip(parts, (slice(None), slice(0, 150), slice(150, None))):
        moments.update(x[rows] + (x.new_tensor(0.0)), types[rows])
    whole, here, there = parts
    ranks = Ranks(settings())
    ranks.size = 2
    shift = (here.shift * here.count[:, None] + there.shift * there.count[:, None]) / whole.count[:, None]
    change, n = there.shift - shift.float().double(), there.count.clone()
    seconds = [
        there.second[k]
        + torch.outer(there.sum[k], change[k])
        + torch.outer(change[k], there.sum[k] + n[k] * change[k])
        for k in range(2)
    ]
    sent = [n, n.clone(), there.shift * n[:, None], *seconds, there.sum + n[:, None] * change]
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *a: tensor.add_(sent.pop(0)))
    monkeypatch.setattr(Ranks, "_gather", lambda self, rows: rows)
    ranks.reduce(here)
    assert not sent
    for kind in (0, 1):
        centre = whole.mean(kind)
        torch.testing.assert_close(here.mean(kind), centre)
        torch.testing.assert_close(here.covariance(kind, centre), whole.covariance(kind, centre), rtol=1e-6, atol=1e-6)


def test_one_process_cannot_share_and_learning_is_not_shared():
    with pytest.raises(ValueError, match="accelerate launch"):
        Ranks(settings(across_processes=True))
    with pytest.raises(ValueError, match="learned"):
        Ranks(settings(across_processes=True, calibration="learned"))


def test_more_processes_than_samples_are_refused():
    ranks = Ranks(settings())
    ranks.size = 7
    with pytest.raises(ValueError, match="6 samples cannot be shared by 7 processes"):
        ranks.share(torch.zeros(6, 4))


def test_the_dearest_group_is_fitted_alone():
    block = tiny("llama").model.layers[0]
    linears = block_linears(block, "model.layers.0", None)
    linears["mlp.down_proj"].in_features = 4000
    ranks = Ranks(settings())
    ranks.size, ranks.splits_fits = 2, True
    groups = [["self_attn.q_proj"], ["self_attn.o_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]]
    assert ranks.owners(groups, linears) == [1, 1, 1, 0]


def test_a_block_stays_below_its_bound():
    """Peak of what a calibration allocates, measured on the CPU, against the formula."""
    model = tiny("llama", num_hidden_layers=1, hidden_size=256, intermediate_size=1024)
    config = settings(low_rank=8)
    block = model.model.layers[0]
    bound = block_bytes(block, 2, 6 * 24, 256, element_size=4)["total"]
    with PeakBytes() as peak:
        quantize(model, config)
    assert peak.bytes < bound
    assert bound < 20 * peak.bytes  # a bound, not a wish
