"""Other programs: one that imports us, one that does not, and one that does not but is run through us."""

import pytest
from safetensors.torch import save_file

from optimum_freeact import save
from tests.helpers import forked
from tests.helpers.quantized import answer, fresh_python, logits, quantized
from tests.helpers.tiny_models import sample_ids


# large enough that a full-precision weight (4 MB each, 50 MB together) would show in the memory used
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "head_dim": 128}

LOAD = """
import json, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
ids = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
import torch
with torch.no_grad():
    equal = torch.equal(model(input_ids=ids["ids"]).logits, ids["logits"])
print(json.dumps({"equal": equal, "kind": type(model.model.layers[0].mlp.up_proj).__name__, "arguments": sys.argv[3:]}))
"""

MEMORY = """
import optimum_freeact, resource, torch, transformers
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    model = quantized("llama", LARGE, preset="rtn", dataset=sample_ids(1, 24), n_samples=1, batch_size=1)
    save(model, folder / "model")
    ids = sample_ids(2, 12, seed=5)
    save_file({"ids": ids, "logits": logits(model, ids)}, folder / "expected.safetensors")
    return folder


def test_two_imports_are_enough_and_memory_stays_that_of_the_codes(saved):
    """Bit-equal in a process that imports optimum_freeact and transformers only, without the full-precision weights."""
    code = MEMORY + LOAD.replace(
        '"arguments"', '"grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "arguments"'
    )
    code = code.replace("import torch\nwith", "with")
    found = answer(fresh_python(code, str(saved / "model"), str(saved / "expected.safetensors")))
    assert found["equal"]
    assert found["kind"] == "FreeActLinear"
    weights = 3 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)  # one byte each as int8 rows, half that as codes
    assert found["grown"] * 1024 < 3.2 * weights  # full precision alone would be 4


def test_without_the_import_loading_fails_and_says_why(saved):
    """Never a model of random weights: the packed tensor bears the name of the weight, so its shape cannot fit."""
    run = forked.run(str(saved / "model"), str(saved / "expected.safetensors"), code=LOAD)
    assert run.returncode != 0
    assert "freeact" in run.stderr  # "Unknown quantization type, got freeact"
    assert "MISMATCH" in run.stderr
    assert "RuntimeError" in run.stderr
    assert "equal" not in run.stdout


def test_a_program_that_does_not_know_us_runs_through_the_wrapper(saved, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(LOAD)
    arguments = [str(saved / "model"), str(saved / "expected.safetensors"), "--limit", "3"]
    found = answer(forked.run(str(script), *arguments, module="optimum_freeact.run"))
    assert found == {"equal": True, "kind": "FreeActLinear", "arguments": ["--limit", "3"]}
