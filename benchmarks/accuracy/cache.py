"""What a 4-bit cache costs a real model, by how it is stored: means of keys and values subtracted, rows rotated, or both.

    python benchmarks/accuracy/cache.py [--models smollm2,qwen2.5] [--weights full w4a4] [--device cuda]

Each sequence is scored once with every cache, in one forward through the cache, on text between what calibration reads and what the
tables of accuracy are made of: this is what chose the default. `divergence` is KL(full precision, 16-bit cache || model), nats a
token, `median_divergence` that of the median token (few tokens have most of the mean); `excess_nll` is the loss above full
precision's. `w4a4` has the default preset's weights and activations, calibrated once for a model and text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.jobs import SLICES, Text
from benchmarks.accuracy.run import fetch_model, pairs, read_texts
from benchmarks.accuracy.scoring import hidden_states
from optimum_freeact import FreeActConfig, tokenize_windows
from optimum_freeact.calibration.data import load_samples
from optimum_freeact.calibration.run import CACHE_SAMPLES, CACHE_TOKENS
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_means import cache_means
from optimum_freeact.modules.kv_store import CacheSpec
from optimum_freeact.modules.runtime import cache_spec
from tools.result_files import RESULTS, command_line, without_places, write


WITHOUT_VALUES = {"value_mean": None}
WITHOUT_MEANS = {"key_mean": None, "key_frequencies": None, "value_mean": None}
CACHES: dict[str, dict] = {
    "16 bits": {"bits": 16},
    "means": {"rotate": False},
    "rotated, means": {"rotate": True},
    "rotated, keys' means": {"rotate": True, **WITHOUT_VALUES},
    "keys' means": {"rotate": False, **WITHOUT_VALUES},
    "rotated": {"rotate": True, **WITHOUT_MEANS},
}


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--models", default="smollm2,qwen2.5")
    made.add_argument("--model-path", action="append", default=[], metavar="NAME=FOLDER")
    made.add_argument("--texts", nargs="+", choices=tuple(SLICES), default=list(SLICES))
    made.add_argument("--text-path", action="append", default=[], metavar="NAME=FILE")
    made.add_argument("--weights", nargs="+", choices=("full", "w4a4"), default=["full", "w4a4"])
    made.add_argument("--caches", nargs="+", choices=tuple(CACHES), default=list(CACHES))
    made.add_argument("--device", default="cpu")
    made.add_argument("--windows", type=int, default=4)
    made.add_argument("--window", type=int, default=512)
    made.add_argument("--samples", type=int, default=32, help="of calibration, 512 tokens each")
    made.add_argument("--rows", type=Path, default=Path("cache_rows.jsonl"), help="appended to, and resumed from")
    made.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results)")
    return made


def calibrated(
    options: argparse.Namespace, path: str, text: Text, weights: str, tokenizer
) -> tuple[nn.Module, CacheSpec]:
    """The model, without a quantized cache, and its 4-bit cache with all means."""
    data, dtype = [text.read_calibration()], torch.float32
    if weights == "full":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(options.device).eval()
        samples = load_samples(data, tokenizer, options.samples, CACHE_TOKENS, 0)[:CACHE_SAMPLES]
        return model, CacheSpec(4, **cache_means(model, samples)._asdict())
    config = FreeActConfig(
        kv_bits=4,
        n_samples=options.samples,
        dataset=data,
        tokenizer=tokenizer,
        calibration_device=options.device,
        progress=False,
    )
    placed = None if options.device == "cpu" else {"": options.device}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map=placed)
    return model.eval(), cache_spec(model, model.hf_quantizer.quantization_config)


@torch.no_grad()
def log_probabilities(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Of all words after each token of a sequence but the last, float32."""
    ids = window[None].to(model.get_input_embeddings().weight.device)
    found = hidden_states(model, ids)[0, :-1]
    return model.get_output_embeddings()(found).float().log_softmax(-1)


def scores(told: torch.Tensor, truth: torch.Tensor, window: torch.Tensor) -> dict[str, float]:
    """Of one sequence, over its tokens."""
    apart = (truth.exp() * (truth - told)).sum(-1)
    lost = (truth - told).gather(-1, window[1:, None].to(told.device))
    return {
        "divergence": float(apart.mean()),
        "median_divergence": float(apart.median()),
        "excess_nll": float(lost.mean()),
    }


def measure(options: argparse.Namespace, name: str, path: str, text: Text, weights: str):
    """Rows of one model, text and kind of weights, as they come."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, spec = calibrated(options, path, text, weights, tokenizer)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(options.device).eval()
    read = text.for_choosing().read_evaluation(options.windows * options.window)
    for index, window in enumerate(tokenize_windows(read, tokenizer, options.window, options.windows)):
        truth = log_probabilities(exact, window)
        for cache in options.caches:
            handle = install_kv_cache(model, dataclasses.replace(spec, **CACHES[cache]))
            found = scores(log_probabilities(model, window), truth, window)
            handle.remove()
            shared = {"model": name, "text": text.name, "weights": weights, "cache": cache, "sequence": index}
            yield [{**shared, "metric": metric, "value": value} for metric, value in found.items()]


def summary(rows: list[dict]) -> list[dict]:
    """Means over sequences, and how a cache compares with the one that has means and is not rotated."""
    groups: dict[tuple, dict[int, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "text", "weights", "cache", "metric"))
        groups.setdefault(key, {})[row["sequence"]] = row["value"]
    made = []
    for (model, text, weights, cache, metric), values in groups.items():
        shared = {"model": model, "text": text, "weights": weights, "cache": cache, "sequences": len(values)}
        made.append({**shared, "metric": metric, "value": statistics.mean(values.values())})
        before = groups.get((model, text, weights, "means", metric))
        if metric == "divergence" and before is not None and cache != "means":
            nearer = sum(value < before[index] for index, value in values.items())
            ratio = sum(values.values()) / sum(before.values())
            made.append({**shared, "metric": "nearer_sequences", "value": nearer})
            made.append({**shared, "metric": "divergence_over_means", "value": ratio})
    return made


def store(rows: list[dict], options: argparse.Namespace) -> Path:
    """Write what was measured so far: bare rows, to resume from, and the result file."""
    options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder, command = options.out or RESULTS, without_places(command_line())
    return write("accuracy_cache", rows + summary(rows), "benchmarks.accuracy.no_claims", command, [0], folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not among the rows yet, and write `accuracy_cache.json`."""
    options = parser().parse_args(arguments)
    given, rows = pairs(options.model_path, "--model-path"), []
    texts = [text for text in read_texts(pairs(options.text_path, "--text-path")) if text.name in options.texts]
    if options.rows.exists():
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    for weights in options.weights:
        for name in options.models.split(","):
            for text in texts:
                done = [r for r in rows if (r["model"], r["text"], r["weights"]) == (name, text.name, weights)]
                if len(done) >= 3 * options.windows * len(options.caches):
                    continue
                rows = [r for r in rows if r not in done]
                for found in measure(options, name, fetch_model(name, given), text, weights):
                    rows += found
                    print(*(json.dumps(r) for r in found), sep="\n", flush=True)
                store(rows, options)
    print(store(rows, options))


if __name__ == "__main__":
    main()
