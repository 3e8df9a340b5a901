"""The same inputs give the same bytes: under any hash seed, and from mergekit's worker threads."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import TensorGroup

from mergekit_ot import maps
from mergekit_ot.method import PARAMETERS, TransportMerge
from mergekit_ot.pipeline import merge_recipe, plan_recipe
from mergekit_ot.recipe import load_recipe
from tests.merge.test_pipeline import OPTIONS, _digest, pair, write_recipe


def test_hash_seeds_do_not_matter(tmp_path):
    _, target, donor = pair(tmp_path, copy="rotated")
    path = write_recipe(tmp_path, target, donor, alpha=0.5)
    here = merge_recipe(load_recipe(path), tmp_path / "here", OPTIONS, plans=tmp_path / "plans-here")
    command = [sys.executable, "-m", "mergekit_ot", "run", str(path), str(tmp_path / "there"), "--quiet"]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([*command, "--plans", str(tmp_path / "plans-there")], check=True, env=environment, cwd=root)
    assert _digest(here) == _digest(tmp_path / "there")
    assert _digest(tmp_path / "plans-here") == _digest(tmp_path / "plans-there")


@pytest.mark.parametrize("on", ["a CPU", "an accelerator"])
def test_worker_threads_with_another_default_device_agree(tmp_path, monkeypatch, on):
    """mergekit's multi-GPU executor calls methods from threads that run under `torch.device`."""
    if on == "an accelerator":  # the way products are taken there
        monkeypatch.setattr(maps, "adds_in_order", lambda _: False)
    model, target, donor = pair(tmp_path, copy="rotated")
    recipe = load_recipe(write_recipe(tmp_path, target, donor, embeddings="shared"))
    _, _, plans = plan_recipe(recipe, tmp_path / "plans", quiet=True)
    method = TransportMerge()
    parameters = {name: default for name, _, default in PARAMETERS}
    parameters |= {"donor": str(donor), "plan": str(plans), "alpha": 0.5}
    reference = ModelReference.model_validate(str(target))
    names = list(model.state_dict())
    found = {}

    def work(part):
        with torch.device("meta"):  # tensors made without naming a device would hold no values
            for name in part:
                group = TensorGroup.from_tensors([model.state_dict()[name]], ids=[reference], base_index=0, name=name)
                found[name] = method.merge_group(group, **parameters)

    threads = [threading.Thread(target=work, args=(names[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == set(names)
    for name in names:
        group = TensorGroup.from_tensors([model.state_dict()[name]], ids=[reference], base_index=0, name=name)
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], method.merge_group(group, **parameters))
    assert len(method._transporters) == 1
