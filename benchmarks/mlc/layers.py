"""At which layer do translations find each other, and does raw cosine say so?

    python benchmarks/mlc/layers.py                      # three small models, minutes on a CPU
    python benchmarks/mlc/layers.py --models smollm2 --prompts 20

Prompts are concepts of CLDR (a name, its keywords, one cue for all languages), untrained models read them, and every layer
and pooling is scored on three things: how often a prompt's nearest neighbour in another language is its own translation,
after centring each language (`retrieval`, high- and low-resource languages apart); the raw cosine of translations; and the
raw cosine of different English prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mlc.concepts import load_concepts
from tools.assets import fetch
from tools.result_files import RESULTS, command_line, write
from trl_mlc.early_exit import decoder_of, n_layers
from trl_mlc.evaluation.geometry import language_geometry
from trl_mlc.scan import prompt_states


GROUPS = {"high": ("fr", "it", "ru", "zh", "vi", "ja", "he", "ko", "ar"), "low": ("bn", "sw", "ur", "ps", "am")}
MODELS = ("gemma3-270m", "qwen2.5", "smollm2")


def prompts(tokenizer, count: int) -> list[list[list[int]]]:
    """Token ids of `count` concepts in English and the languages of `GROUPS`."""
    languages = ("en", *GROUPS["high"], *GROUPS["low"])

    def text(concept: dict, language: str) -> str:
        found = concept["texts"][language]
        return f"{found['name']}: {', '.join(found['keywords'][:3])}\nAnswer:"

    chosen = load_concepts(fetch("concepts"), languages[1:])[:count]
    return [[tokenizer(text=text(c, name))["input_ids"] for name in languages] for c in chosen]


def score(states: torch.Tensor) -> dict[str, float]:
    """Metrics of one layer: `states` (languages, prompts, d), English first."""
    names = ("en", *GROUPS["high"], *GROUPS["low"])
    geometry = language_geometry(dict(zip(names, states, strict=True)), "en")
    units = torch.nn.functional.normalize(states.double(), dim=-1)
    cosine = dict(zip(names, (units * units[0]).sum(-1).mean(-1).tolist(), strict=True))
    found = {"cross_prompt_cosine": geometry["en"]["cross_prompt_cosine"]}
    for group, members in GROUPS.items():
        found[f"retrieval_{group}"] = statistics.fmean(geometry[name]["retrieval_at_1"] for name in members)
        found[f"raw_cosine_{group}"] = statistics.fmean(cosine[name] for name in members)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="asset names")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        folder = fetch(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        decoder = decoder_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        groups, layers = prompts(tokenizer, options.prompts), range(1, n_layers(decoder) + 1)
        for pooling in ("last", "mean"):
            states = prompt_states(decoder, groups, layers, pooling)
            for layer, found in zip(layers, map(score, states), strict=True):
                tag = {"model": name, "pooling": pooling, "layer": layer, "prompts": options.prompts}
                rows += [{**tag, "metric": metric, "value": value} for metric, value in found.items()]
                print(name, pooling, layer, {k: round(v, 3) for k, v in found.items()}, flush=True)
        write("mlc_layers", rows, "benchmarks.mlc.no_claims", command_line(), [0], folder=options.folder)


if __name__ == "__main__":
    main()
