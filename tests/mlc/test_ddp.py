"""Two gloo processes must train as one."""

from pathlib import Path

import pytest
import torch

from tests.helpers import forked
from tests.mlc.ddp_worker import CASES, run_case


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    done = forked.together(forked.ranks(2), tiny, str(folder), module="tests.mlc.ddp_worker")
    assert [each.returncode for each in done] == [0, 0], "".join(each.stderr[-4000:] for each in done)
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one(case, two_processes, tiny, tmp_path):
    alone = run_case(case, tiny, tmp_path, world=1)
    first, second = (torch.load(two_processes / f"{case}-2-{rank}.pt") for rank in (0, 1))
    assert alone.keys() == first.keys() == second.keys()
    assert any("mlc_extractor" in name for name in alone)
    assert alone["logged"].numel() >= 2
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between processes"
        assert torch.allclose(first[name], value, rtol=1e-4, atol=2e-6), (
            f"{name}: {(first[name] - value).abs().max():.2e} away from the single process"
        )


def test_sharded_parameters_get_the_same_gradient(two_processes):
    assert {path.name for path in two_processes.glob("fully_shard-*")} == {"fully_shard-0", "fully_shard-1"}


def test_a_reference_model_has_its_weights_on_every_process_before_it_is_sharded(two_processes):
    first, second = (torch.load(two_processes / f"reference-{rank}.pt") for rank in (0, 1))
    assert set(first) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert first["weight"].any()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_sharding_is_the_hosts_own_again_after_a_trainer_is_made():
    from trl.trainer import dpo_trainer

    from trl_mlc.dpo import MLCDPOTrainer
    from trl_mlc.reference import whole_reference

    stock = dpo_trainer.prepare_fsdp
    with whole_reference(MLCDPOTrainer):
        assert dpo_trainer.prepare_fsdp is not stock
    assert dpo_trainer.prepare_fsdp is stock
