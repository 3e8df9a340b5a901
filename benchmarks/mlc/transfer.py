"""Does a rule taught in English hold in other languages, and is it translation that carries it?

    python benchmarks/mlc/transfer.py           # the table: all methods, three seeds
    python benchmarks/mlc/transfer.py --map     # one seed over layer, weight, centring, repulsion, extractor, ...
    python benchmarks/mlc/transfer.py --tiny    # minutes on a CPU: proves that it runs

Task: see `concepts.py`. Every run trains on the same English preferences for the same steps; it is scored on concepts
never trained on. Runs already in the result file are not repeated, so a table can be filled in several calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks._results import RESULTS, command_line, read, write
from benchmarks.mlc.concepts import DECLINES, HELD_OUT, SEEN, split
from benchmarks.mlc.transfer_claims import OURS as OUR_METHOD
from benchmarks.mlc.transfer_claims import claims
from tools.assets import fetch
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.evaluation.preferences import perplexity
from trl_mlc.evaluation.report import evaluate_model
from trl_mlc.parallel import shuffled_translations


PLAIN = {"mlc_weight": 1.0, "mlc_layer": "auto", "mlc_every": 1}
CENTRED = {**PLAIN, "mlc_center": True, "mlc_extractor_dim": 0}
OURS = {**CENTRED, "mlc_repulsion": 1.0}
METHODS = {
    "aligned": {"mlc_weight": 0.0},
    "mlc": PLAIN,
    "mlc.shuffled": {**PLAIN, "shuffled": True},
    "cosine": {**PLAIN, "mlc_objective": "cosine"},
    "center": CENTRED,
    "center+repulsion": OURS,
    "center+repulsion.shuffled": {**OURS, "shuffled": True},
}
MAP = {
    "aligned": METHODS["aligned"],
    OUR_METHOD: OURS,
    **{f"{OUR_METHOD}/layer={layer}": {**OURS, "mlc_layer": layer} for layer in (6, 12, 15, -1)},
    **{f"{OUR_METHOD}/weight={weight}": {**OURS, "mlc_weight": weight} for weight in (0.3, 3.0)},
    f"{OUR_METHOD}/mean-pooling": {**OURS, "mlc_pooling": "mean"},
    f"{OUR_METHOD}/extractor=512": {**OURS, "mlc_extractor_dim": 512},
    f"{OUR_METHOD}/extractor=512,frozen": {**OURS, "mlc_extractor_dim": 512, "mlc_extractor_frozen": True},
    f"{OUR_METHOD}/extractor=512,lr=1e-3": {**OURS, "mlc_extractor_dim": 512, "mlc_extractor_lr": 1e-3},
    f"{OUR_METHOD}/every=2": {**OURS, "mlc_every": 2},
    f"{OUR_METHOD}/3-languages": {**OURS, "mlc_languages_per_step": 3},
    f"{OUR_METHOD}/signed": {**OURS, "mlc_signed": True},
    f"{OUR_METHOD}/sigma=none": {**OURS, "mlc_sigma_norm": "none"},
    "center": CENTRED,
    "repulsion-only": {**PLAIN, "mlc_repulsion": 1.0, "mlc_extractor_dim": 0},
    "cosine+center+repulsion": {**OURS, "mlc_objective": "cosine"},
    "mlc": PLAIN,
    "mlc/published": {"mlc_weight": 0.8, "mlc_layer": -1, "mlc_every": 2},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gemma3-270m", help="asset name or folder")
    parser.add_argument("--methods", nargs="+", help=f"of {list(METHODS)} (or of the map)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--lora", type=int, default=16, help="rank; 0 trains all weights")
    parser.add_argument("--limit", type=int, help="use this many concepts in all")
    parser.add_argument("--map", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="4 steps on few concepts, for a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.limit, options.seeds = 4, 2, 24, options.seeds[:2]
    if options.map:
        options.seeds = options.seeds[:1]
    options.name = "mlc_transfer" + ("_map" if options.map else "") + ("_tiny" if options.tiny else "")
    return options


def english_text(tokenizer, tiny: bool) -> list[list[int]]:
    """Running English for perplexity, unrelated to the task."""
    lines = (fetch("handbook") / "text.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if 200 < len(line) < 800][: 4 if tiny else 100]
    return [tokenizer(text=line)["input_ids"] for line in kept]


def train(folder: str, tokenizer, data, settings: dict, seed: int, options) -> tuple:
    """One run; returns the model, the layer used and seconds."""
    settings = dict(settings)
    if settings.pop("shuffled", False):
        data = shuffled_translations(data, seed)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    peft = (
        LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear") if options.lora else None
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = MLCDPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=max(1, options.steps // 10),
            seed=seed,
            **settings,
        )
        trainer = MLCDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    layer = trainer._mlc_pass.layer if trainer._mlc_pass is not None else None
    final = {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith("mlc/") or k == "loss"}
    return trainer.model, layer, {"train_seconds": seconds, **final}


def measure(model, tokenizer, test, text, layer: int | None, numbers: dict, tag: dict) -> list[dict]:
    """Rows of one model: per language, between languages, perplexity."""
    report = evaluate_model(model, tokenizer, test, layer=layer, batch_size=32, texts={})
    rows = [
        {**tag, "metric": metric, "language": name, "value": value}
        for name, found in report.languages.items()
        for metric, value in found.items()
    ]
    accuracy = {name: found["accuracy"] for name, found in report.languages.items()}
    for group, names in (("seen", ("en", *SEEN)), ("held_out", HELD_OUT)):
        values = [accuracy[name] for name in names]
        rows.append({**tag, "metric": f"variance_x100_{group}", "value": 100 * statistics.pvariance(values)})
        rows.append({**tag, "metric": f"accuracy_{group}", "value": statistics.fmean(values)})
    others = [accuracy[name] for name in (*SEEN, *HELD_OUT)]
    rows.append({**tag, "metric": "accuracy_transfer", "value": statistics.fmean(others)})
    rows.append({**tag, "metric": "accuracy_english", "value": accuracy["en"]})
    rows.append({**tag, "metric": "perplexity_english", "value": perplexity(model.eval(), text, 8)})
    rows += [{**tag, "metric": name, "value": value} for name, value in numbers.items()]
    return rows


def always_decline(test, seed: int) -> dict:
    """The constant answer, scored on the same rows; the same in every language."""
    share = statistics.fmean(float(row["chosen"] in DECLINES) for row in test)
    return {"method": "always-decline", "seed": seed, "metric": "accuracy_transfer", "value": share}


def base_rows(folder: str, tokenizer, test, text, seed: int) -> list[dict]:
    """The untrained model, and the constant answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(model, tokenizer, test, text, None, {}, {"method": "base", "seed": seed})
    return [*rows, always_decline(test, seed)]


def main() -> None:
    options = parse()
    table = MAP if options.map else METHODS
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = english_text(tokenizer, options.tiny)
    path = options.folder / f"{options.name}.json"
    rows = read(path)["rows"] if path.is_file() else []
    source = "benchmarks.mlc." + ("transfer_claims" if options.name == "mlc_transfer" else "no_claims")
    fixed = {k: getattr(options, k) for k in ("model", "steps", "batch", "lora", "learning_rate", "limit")}
    for seed in options.seeds:
        train_data, test_data = split(fetch("concepts"), seed=seed, limit=options.limit)
        done = {(row["method"], row["seed"]) for row in rows}
        if ("base", seed) not in done:
            rows += base_rows(folder, tokenizer, test_data, text, seed)
        for method in options.methods or table:
            if (method, seed) in done:
                continue
            model, layer, numbers = train(folder, tokenizer, train_data, table[method], seed, options)
            tag = {"method": method, "seed": seed, **({"layer": layer} if layer is not None else {})}
            fresh = measure(model, tokenizer, test_data, text, layer, numbers, tag)
            fresh[-1]["settings"] = json.dumps({**fixed, **table[method]})
            rows += fresh
            del model
            summary = {r["metric"]: round(r["value"], 4) for r in fresh if "language" not in r}
            print(f"seed {seed} {method:32}", summary, flush=True)
            seeds = sorted({row["seed"] for row in rows})
            write(options.name, rows, source, command_line(), seeds, folder=options.folder)
    for found in claims(rows) if options.name == "mlc_transfer" else []:
        verdict = "holds" if found["holds"] else "FALLS SHORT"
        print(f"{found['id']:45} {found['value']:10.4f} {found['compare']} {found['target']:<6} {verdict}")


if __name__ == "__main__":
    main()
