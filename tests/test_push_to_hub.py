"""`push_to_hub` of a quantized model and of an aligned one, to a stand-in on this machine, and back from what arrived."""

import json
import os
import subprocess
import sys

import torch

from tests.helpers.hub import local_hub
from tests.helpers.quantized import ROOT, logits, quantized, reload


def in_process(code: str, url: str, *arguments: str) -> None:
    """Run code that talks to the stand-in; the endpoint is read when huggingface_hub is imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_TOKEN": "hf_" + "x" * 34,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_quantized_model(tmp_path):
    model = quantized("llama")
    model.save_pretrained(tmp_path / "saved")
    code = """
import sys, optimum_freeact
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/model")
"""
    with local_hub(tmp_path / "hub") as url:
        in_process(code, url, str(tmp_path / "saved"))
    arrived = tmp_path / "hub" / "me" / "model"
    assert {"config.json", "model.safetensors"} <= {path.name for path in arrived.iterdir()}
    assert torch.equal(logits(reload(arrived)), logits(model))


def test_an_aligned_model(tmp_path):
    """Through the trainer's own `push_to_hub`: model, card and the extractor's state."""
    from tests.mlc.conftest import byte_tokenizer, rows, tiny_llama

    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(rows(6)))
    code = """
import json, sys
from datasets import Dataset
from transformers import AutoTokenizer
from trl_mlc import MLCDPOConfig, MLCDPOTrainer
folder = sys.argv[1]
args = MLCDPOConfig(output_dir=folder + "/out", max_steps=1, bf16=False, use_cpu=True, report_to="none", mlc_layer=2,
                    hub_model_id="me/aligned", push_to_hub=False, save_strategy="no")
data = Dataset.from_dict(json.load(open(folder + "/rows.json")))
trainer = MLCDPOTrainer(folder + "/model", args=args, train_dataset=data,
                        processing_class=AutoTokenizer.from_pretrained(folder + "/model"))
trainer.train()
trainer.push_to_hub()
"""
    with local_hub(tmp_path / "hub") as url:
        in_process(code, url, str(tmp_path))
    arrived = tmp_path / "hub" / "me" / "aligned"
    names = {path.name for path in arrived.iterdir()}
    assert {"config.json", "model.safetensors", "mlc_state.safetensors", "mlc_config.json", "README.md"} <= names
    from trl_mlc.state import load_state

    assert load_state(arrived).config["layer"] == 2
