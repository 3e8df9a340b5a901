"""What `embedding_bits=8` costs by itself: likelihood and bytes of full-precision models with embeddings and head in bytes.

python -m benchmarks.speed.embeddings --model smollm2=PATH --text handbook=FILE [--windows 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_freeact.modules.embeddings import replace_embeddings
from optimum_freeact.report.evaluate import score_text, tokenize_windows
from optimum_freeact.report.sizes import tensor_bytes
from tools.result_files import command_line, write


def embedding_bytes(model: torch.nn.Module) -> int:
    """Bytes of input embeddings and output head, tied ones once, as bfloat16 where they are floating."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values()
    return sum(2 * t.numel() if t.is_floating_point() else tensor_bytes([t]) for t in tensors)


def main() -> None:
    """Score each model on each text, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    rows = []
    for name, path in (item.split("=", 1) for item in args.model):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for bits in (16, 8):
            if bits == 8:
                replace_embeddings(model)
            rows.append({"model": name, "embedding_bits": bits, "metric": "bytes", "value": embedding_bytes(model)})
            for text, file in (item.split("=", 1) for item in args.text):
                windows = tokenize_windows(
                    Path(file).read_text(encoding="utf-8"), tokenizer, args.window, args.windows
                )
                score = score_text(model, windows)
                rows.append({"model": name, "embedding_bits": bits, "text": text, "metric": "nll", "value": score.nll})
                print(rows[-1], flush=True)
    print(write("speed_embeddings", rows, "benchmarks.speed.no_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
