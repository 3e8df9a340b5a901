"""Which languages does the untouched model read? What `concepts.READ` was made by, before anything was trained.

    python benchmarks/mlc/languages.py                    # minutes on a CPU; --part 0/2 and 1/2 for two at a time

A language counts as read if the last states of prompts that name one concept find the state of the same concept in English
among `NAMES` of them, and are found by it, at least `LEAST` times in a hundred on average (by chance: once), each language
centred. The layer is the one at four fifths of the depth, as `trl_mlc.evaluation` has it by default.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._results import RESULTS, command_line, write
from benchmarks.mlc.concepts import POOL, by_turns, load_concepts, prompt_text
from tools.assets import fetch
from trl_mlc.early_exit import decoder_of, n_layers
from trl_mlc.evaluation.geometry import language_geometry
from trl_mlc.scan import prompt_states


NAMES, LEAST, SEED = 100, 0.1, 1000  # a seed of concepts that neither the table nor the map uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gemma3-270m", help="asset name or folder")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th language, from the I-th")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    options = parser.parse_args()
    first, step = map(int, options.part.split("/"))
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    concepts = [c for c in load_concepts(fetch("concepts"), POOL, SEED) if " " not in c["texts"]["en"]["name"]]
    concepts = by_turns(concepts)[:NAMES]
    random.Random(SEED).shuffle(concepts)
    decoder = decoder_of(model)
    layer = round(0.8 * n_layers(decoder))

    def states(language: str) -> torch.Tensor:
        ids = [tokenizer(text=prompt_text((concept,), language))["input_ids"] for concept in concepts]
        return prompt_states(decoder, [[one] for one in ids], [layer], "last", 50)[0, 0]

    english, rows = states("en"), []
    for name in POOL[first::step]:
        found = language_geometry({"en": english, name: states(name)}, "en")[name]["retrieval_at_1"]
        rows.append({"method": "base", "metric": "retrieval_at_1", "language": name, "value": found, "layer": layer})
        print(f"{name:4} {found:.3f}", flush=True)
    suffix = "" if step == 1 else f"_{first}"
    write(f"mlc_languages{suffix}", rows, "benchmarks.mlc.no_claims", command_line(), [SEED], folder=options.folder)


if __name__ == "__main__":
    main()
