"""mergekit's GPU options give what the CPU gives: one device, and its executor for several."""

import pytest
import torch
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from mergekit_ot.pipeline import merge_recipe
from mergekit_ot.recipe import load_recipe
from tests.merge.test_pipeline import OPTIONS, distance, pair, write_recipe


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"multi_gpu": True}, {"low_cpu_memory": True}], ids=str)
def test_gpu_options_of_mergekit_agree_with_the_cpu(tmp_path, options):
    model, target, donor = pair(tmp_path, "qwen2", "permuted", tied=False)
    recipe = load_recipe(write_recipe(tmp_path, target, donor, alpha=0.5))
    merged = {}
    for name, chosen in {"cpu": OPTIONS, "gpu": MergeOptions(quiet=True, device="cuda", **options)}.items():
        out = merge_recipe(recipe, tmp_path / name, chosen, plans=tmp_path / f"plans of {name}")
        merged[name] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    moved = 0
    for name, parameter in merged["cpu"].named_parameters():
        assert distance(merged["gpu"].get_parameter(name), parameter) < 1e-5, name
        assert distance(parameter, model.get_parameter(name)) < 1e-5, name  # the donor is the target
        moved += not torch.equal(parameter, model.get_parameter(name))
    assert moved
