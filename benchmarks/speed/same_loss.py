"""Does a model lose anything to the kernels that run it? Likelihood of a real model with them and with torch's own products.

python -m benchmarks.speed.same_loss --model smollm2=PATH --text handbook=FILE [--presets freeact freeact-fast] [--device cuda]

Each preset is calibrated once; then the same codes are scored by torch and by the package's kernels for the device (C on a CPU, Triton and
Gluon on a GPU), in half precision where those need it. `divergence` is KL(torch's || the other's), nats a token: what differs.

Four-bit activations round a number that lies between two codes either way, and one code that falls the other way changes all that follows. How
much that alone makes is a control: torch's own products once more, with the embeddings larger by one part in a million.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_freeact import FreeActConfig
from optimum_freeact.kernels.dispatch import ENVIRONMENT
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.runtime import activate
from optimum_freeact.report.evaluate import tokenize_windows
from tools.result_files import command_line, write


KERNELS = {"cpu": "native", "cuda": "triton"}


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Of all tokens of a vocabulary, `(windows, tokens - 1, vocabulary)` float32 on the CPU."""
    device = next(model.parameters()).device
    rows = [model(row[None].to(device)).logits[0, :-1].float().log_softmax(-1).cpu() for row in windows]
    return torch.stack(rows)


def nudged(model: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """The model with embeddings larger by one part in a million (by the last digit, in half precision)."""

    def larger(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + max(1e-6, torch.finfo(output.dtype).eps))

    return model.get_input_embeddings().register_forward_hook(larger)


def served(model: torch.nn.Module, kernels: str) -> int:
    """How many linears run by the kernels wanted, after the choice was made anew."""
    os.environ[ENVIRONMENT] = kernels
    activate(model, model.hf_quantizer.quantization_config)
    linears = (module for module in model.modules() if isinstance(module, FreeActLinear))
    return sum(linear._native is not None or linear.source._tables is not None for linear in linears)


def measure(path: str, text: str, preset: str, options: argparse.Namespace) -> list[dict]:
    """Rows of one model, text and preset."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    read = Path(text).read_text(encoding="utf-8")
    config = FreeActConfig(
        preset,
        weight_bits=4,
        activation_bits=4,
        dataset=[read[:300_000]],
        tokenizer=tokenizer,
        calibration_device=options.device,
        progress=False,
    )
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).to(options.device)
    windows = tokenize_windows(read[600_000:], tokenizer, options.window, options.windows)
    wanted, kernels = windows[:, 1:, None], KERNELS[options.device]
    rows, plain = [], torch.empty(0)
    for name, run_by in (("torch", "torch"), ("torch, nudged", "torch"), (kernels, kernels)):
        linears = served(model.eval(), run_by)
        handle = nudged(model) if name == "torch, nudged" else None
        found = log_probabilities(model, windows)
        if handle is not None:
            handle.remove()
        nll = float(-found.gather(-1, wanted).mean())
        rows.append({"kernels": name, "linears": linears, "metric": "nll", "value": nll})
        plain = found if name == "torch" else plain
        divergence = float((plain.exp() * (plain - found)).sum(-1).mean())
        rows.append({"kernels": name, "metric": "divergence", "value": divergence})
    return rows


def main() -> None:
    """Score each model on each text with each preset, both ways."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--presets", nargs="+", default=["freeact", "freeact-fast", "freeact-fastest"])
    parser.add_argument("--device", choices=sorted(KERNELS), default="cpu")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    rows = []
    for name, path in (item.split("=", 1) for item in options.model):
        for text, file in (item.split("=", 1) for item in options.text):
            for preset in options.presets:
                shared = {"model": name, "text": text, "preset": preset, "device": options.device}
                rows += [{**shared, **row} for row in measure(path, file, preset, options)]
                print(*rows[-6:], sep="\n", flush=True)
    print(write("speed_same_loss", rows, "benchmarks.speed.no_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
