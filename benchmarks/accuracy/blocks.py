"""How far the first blocks of a real model are from full precision: minutes on a CPU, no likelihoods.

    python benchmarks/accuracy/blocks.py                     # accuracy_blocks.json

The relative squared error of the hidden states behind the first blocks, on held-out text, first tokens left out. It ranks
methods before a whole model is measured; what they cost in nats only `run.py` says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.jobs import SLICES, bits
from benchmarks.accuracy.plan import QUAROTS
from benchmarks.accuracy.run import fetch_model, pairs, read_texts
from tools import result_files


METHODS: dict[str, dict] = {
    "quarot": {"preset": "quarot"},
    **QUAROTS,
    "freeact-fast": {"preset": "freeact-fast"},
    "freeact activation_group_size=32": {"preset": "freeact", "activation_group_size": 32},
    "freeact": {"preset": "freeact"},
    "freeact-learned": {"preset": "freeact", "calibration": "learned", "epochs": 8},
}
WINDOWS = 8


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--models", default="smollm2,qwen2.5")
    add("--model-path", action="append", default=[], metavar="NAME=FOLDER")
    add("--text-path", action="append", default=[], metavar="NAME=FILE")
    add("--blocks", type=int, default=3)
    add("--samples", type=int, default=24)
    add("--seq-len", type=int, default=256)
    add("--methods", default=",".join(METHODS))
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of the result (default: benchmarks/results)")
    return made


def errors(options: argparse.Namespace, name: str, path: str, texts) -> list[dict]:
    """A row per method."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_freeact import FreeActConfig, tokenize_windows

    tokenizer = AutoTokenizer.from_pretrained(path)
    read = [text.read_evaluation(WINDOWS * options.seq_len) for text in texts]
    windows = torch.cat([tokenize_windows(text, tokenizer, options.seq_len, WINDOWS // len(texts)) for text in read])

    @torch.no_grad()
    def states(**arguments) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            path, num_hidden_layers=options.blocks, dtype=torch.float32, **arguments
        )
        return model.get_decoder()(input_ids=windows).last_hidden_state[:, 1:]

    wanted, rows = states(), []
    for method in options.methods.split(","):
        config = FreeActConfig(
            **METHODS[method],
            **bits("w4a4"),
            dataset=[text.read_calibration() for text in texts],
            tokenizer=tokenizer,
            n_samples=options.samples,
            seq_len=options.seq_len,
            seed=options.seed,
            progress=False,
        )
        gap = states(quantization_config=config) - wanted
        value = float(gap.square().sum() / wanted.square().sum())
        row = {"model": name, "group": "blocks", "method": method, "setting": "w4a4", "blocks": options.blocks}
        rows.append({**row, "metric": "relative_error", "value": value, "seed": options.seed})
        print(f"{name} {method}: {value:.5f}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """0 when all was measured."""
    options = parser().parse_args(arguments)
    given, texts = pairs(options.model_path, "--model-path"), read_texts(pairs(options.text_path, "--text-path"))
    assert set(SLICES) == {text.name for text in texts}
    rows = [
        row for name in options.models.split(",") for row in errors(options, name, fetch_model(name, given), texts)
    ]
    command = "python benchmarks/accuracy/blocks.py " + " ".join(arguments or sys.argv[1:])
    folder = options.out or result_files.RESULTS
    path = result_files.write(
        "accuracy_blocks", rows, "benchmarks.accuracy.no_claims", command.strip(), [options.seed], folder=folder
    )
    print(f"Wrote {path.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
