"""One run of `transfer.py`: train, then score."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.mlc.concepts import CONCEPTS, DECLINES, SCORED, Split, draw_languages, split
from benchmarks.mlc.transfer_methods import BASE, SWEPT, methods, point
from tools.assets import fetch
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.embedding import set_embedding_lr, untie_head
from trl_mlc.evaluation.preferences import perplexity
from trl_mlc.evaluation.report import evaluate_model
from trl_mlc.parallel import shuffled_translations


EMBEDDING = "model.embed_tokens.weight"


def groups(seed: int, validating: bool) -> dict[str, tuple[str, ...]]:
    """Languages that are scored together: the map sees none that the table may hold out."""
    taught, related, far = draw_languages(seed, validating)
    name = "validation" if validating else "held_out"
    seen = ("en", *taught[:SCORED])
    return {"seen": seen, name: related, f"{name}_far": far, f"{name}_all": (*related, *far)}


def perform(method: str, settings: dict, seed: int, options: argparse.Namespace, mapping: bool) -> list[dict]:
    """All rows of one method and seed; `base` is the untrained model, and the constant answer."""
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    tokenizer = tokenizer_of(folder)
    scored = groups(seed, mapping)
    settings = dict(settings)
    taught = draw_languages(seed, mapping).taught[: settings.pop("taught", None)]
    tested = tuple(dict.fromkeys(name for names in scored.values() for name in names if name != "en"))
    counts = (options.rows_train, options.rows_test)
    data = split(fetch("concepts"), seed, *counts, taught, tested, settings.pop("concepts", CONCEPTS))
    if mapping:  # new words are the table's
        data = Split(data.train, data.test, data.new_words.select([]))
    tokenizer.remember(text for row in data.train for text in row["prompt_translations"].values())
    text = english_text(tokenizer, 4 if options.rows_test < 50 else 100)
    tag = {"method": method, "seed": seed}
    if method == BASE:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        share = statistics.fmean(float(row["chosen"] in DECLINES) for row in data.test)
        constant = {"method": "always-decline", "seed": seed, "metric": "accuracy_transfer", "value": share}
        return [*measure(model, tokenizer, data, text, None, tag, scored), constant]
    kept = settings.pop("kept", 0.0)
    swept = isinstance(kept, list)
    model, layer, numbers, used = train(folder, tokenizer, data.train, settings, seed, options, 0.0 if swept else kept)
    if layer is not None:
        numbers["layer"] = layer

    def measured(name: str) -> list[dict]:
        return measure(model, tokenizer, data, text, layer, {**tag, "method": name}, scored)

    rows = sweep(model, folder, kept, measured, method.removesuffix(SWEPT)) if swept else measured(method)
    rows += [{**tag, "metric": name, "value": value} for name, value in numbers.items()]
    return [*rows, {**tag, "metric": "steps", "value": used["steps"], "settings": json.dumps(used)}]


@functools.cache
def tokenizer_of(folder: str):
    """The tokenizer, once per worker; it remembers prompts, which are tokenized several times in a run and in others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known: dict[str, list[int]] = {}

    class Remembering(type(tokenizer)):
        def __call__(self, text=None, **options):
            if not isinstance(text, str) or options:
                return super().__call__(text, **options)
            if text not in known:
                known[text] = super().__call__(text)["input_ids"]
            return {"input_ids": list(known[text]), "attention_mask": [1] * len(known[text])}

        def remember(self, texts) -> None:
            """Many at once, by several threads and without a call for each."""
            fresh = list(dict.fromkeys(text for text in texts if text not in known))
            if fresh:
                known.update(zip(fresh, super().__call__(fresh)["input_ids"], strict=True))

    tokenizer.__class__ = Remembering
    return tokenizer


def english_text(tokenizer, count: int) -> list[list[int]]:
    """Running English for perplexity, unrelated to the task."""
    lines = (fetch("handbook") / "text.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if 200 < len(line) < 800][:count]
    return [tokenizer(text=line)["input_ids"] for line in kept]


def sweep(model, folder: str, shares: list[float], measured, name: str) -> list[dict]:
    """Rows of one trained model at several shares of the way back to its first weights, in ascending order."""
    first = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    rows, at = [], 0.0
    for share in shares:
        with torch.no_grad():
            for key, value in model.named_parameters():
                start = first[key if key in first else EMBEDDING]  # an untied head began as the embedding
                value.lerp_(start.to(value.device), (share - at) / (1 - at))
        at = share
        rows += measured(f"{name}-kept{share:g}" if share else name)
    return rows


def train(
    folder: str, tokenizer, data, settings: dict, seed: int, options: argparse.Namespace, kept: float = 0.0
) -> tuple:
    """Returns the model, the layer used, what was logged, and all settings."""
    own = {"lora": 0, "steps": options.steps, **settings}
    if options.tiny:
        own["steps"] = options.steps
    used = {
        "model": Path(folder).name,
        "batch": options.batch,
        "rows": len(data),
        **own,
        **({"kept": kept} if kept else {}),
    }
    rate, rank, steps = own.pop("learning_rate"), own.pop("lora"), own.pop("steps")
    shuffled, words_rate = own.pop("shuffled", None), own.pop("embedding_rate", None)
    warmup, head = own.pop("warmup", 0.1), own.pop("head", None)
    if shuffled:
        data = shuffled_translations(data, seed, each=shuffled == "each")
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if head == "frozen" and words_rate and own.get("mlc_weight") != 0:
        own["mlc_embedding_lr"], head, words_rate = words_rate, None, None  # the trainer does both
    if head == "frozen":
        untie_head(model)
    if words_rate == 0:
        model.get_input_embeddings().requires_grad_(False)
    start_weights = {n: p.detach().clone() for n, p in model.named_parameters()} if kept and not rank else {}
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(
            output_dir=scratch,
            per_device_train_batch_size=options.batch,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=round(steps * warmup),
            logging_steps=max(1, steps // 10),
            seed=seed,
            **own,
        )
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None
        trainer = MLCDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
        if words_rate:
            set_embedding_lr(trainer.create_optimizer(), trainer.model, words_rate)
        start = time.perf_counter()
        trainer.train()
        numbers = {"train_seconds": time.perf_counter() - start}
    numbers |= first_and_last(trainer.state.log_history)
    layer = trainer._mlc_pass.layer if trainer._mlc_pass is not None else None
    trained = trainer.model
    if rank:
        scale_adapters(trained, 1 - kept)
        trained = trained.merge_and_unload()
    pull_back(trained, start_weights, kept)
    del trainer  # its optimizer takes twice the model's memory
    gc.collect()
    torch.cuda.empty_cache()
    return trained, layer, numbers, used


def arguments(**given) -> MLCDPOConfig:
    """What all runs have in common, and what is `given`."""
    gpu = torch.cuda.is_available()
    return MLCDPOConfig(
        lr_scheduler_type="cosine",
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=64,
        gradient_checkpointing=given.get("mlc_weight") != 0,  # DPO's own rows are few and short
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=gpu,  # computing only: weights stay in float32
        tf32=True if gpu else None,
        use_cpu=not gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **given,
    )


LOGGED = ("loss", "rewards/accuracies", "mlc/loss", "mlc/cross_prompt_cosine", "mlc/repulsion", "mlc/contrast")


def first_and_last(history: list[dict]) -> dict[str, float]:
    """What a trainer logged of its losses, at the beginning and at the end."""
    log = [entry for entry in history if "loss" in entry]
    ends = (("first", log[0]), ("last", log[-1]))
    return {f"{name} {when}": float(entry[name]) for name in LOGGED for when, entry in ends if name in entry}


@torch.no_grad()
def pull_back(model, start_weights: dict[str, torch.Tensor], share: float) -> None:
    """Weights a share of the way back to where they started, those of them that are given."""
    for name, value in model.named_parameters():
        if name in start_weights:
            value.lerp_(start_weights[name].to(value.device), share)


def scale_adapters(model, share: float) -> None:
    """Go only a share of the way from the first weights to the trained ones."""
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_B"):
            module.scaling = {name: share * value for name, value in module.scaling.items()}


def measure(model, tokenizer, data, text, layer: int | None, tag: dict, scored: dict) -> list[dict]:
    """Rows of one model: per language, between languages, perplexity."""
    rows = []
    part = {name: group for group, names in reversed(scored.items()) for name in names}  # the first group that has it
    for test, suffix in ((data.test, ""), (data.new_words, "_new_words")):
        if len(test) == 0:
            continue
        report = evaluate_model(model, tokenizer, test, layer=layer, batch_size=100, texts={})
        rows += [
            {**tag, "metric": metric + suffix, "language": name, "part": part[name], "value": value}
            for name, found in report.languages.items()
            for metric, value in found.items()
            if metric in (("accuracy",) if suffix else ("accuracy", "margin", "retrieval_at_1"))
        ]
        accuracy = {name: found["accuracy"] for name, found in report.languages.items()}
        numbers = {"accuracy_english": accuracy["en"]}
        for group, names in scored.items():
            numbers[f"variance_x100_{group}"] = 100 * statistics.pvariance([accuracy[name] for name in names])
            numbers[f"accuracy_{group}"] = statistics.fmean(accuracy[name] for name in names)
            found = [report.languages[name]["retrieval_at_1"] for name in names if name != "en"]
            numbers[f"retrieval_{group}"] = statistics.fmean(found)
        others = [name for name in report.languages if name != "en"]
        numbers["accuracy_transfer"] = statistics.fmean(accuracy[name] for name in others)
        numbers["cross_prompt_cosine_english"] = report.languages["en"]["cross_prompt_cosine"]
        rows += [{**tag, "metric": name + suffix, "value": value} for name, value in numbers.items()]
    rows.append({**tag, "metric": "perplexity_english", "value": perplexity(model.eval(), text, 4)})
    return rows


def one_kernel_norms() -> None:
    """Gemma's norms as one kernel instead of seven: most of what a step of a model this small launches."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    def forward(self, x):
        return torch.nn.functional.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(
            x
        )

    Gemma3RMSNorm.forward = forward


def serve(options: argparse.Namespace) -> None:
    """Perform runs named on standard input, one a line, until it ends: ours, or nothing for the map; method; seed; file."""
    import sys

    logging.disable(logging.WARNING)
    one_kernel_norms()
    # `datasets` names what a map makes by hashing its arguments, Gemma's half a million merges among them: seconds each
    datasets.arrow_dataset.update_fingerprint = lambda *_: datasets.fingerprint.generate_random_fingerprint()
    for line in sys.stdin:
        ours, method, seed, target = line.rstrip("\n").split("\t")
        settings = methods(ours)[method] if ours else point(method)
        try:
            found = perform(method, settings, int(seed), options, mapping=not ours)
        except Exception as error:  # one run's failure must not end the worker
            found = {"error": f"{type(error).__name__}: {error}"[-1500:]}
        gc.collect()
        torch.cuda.empty_cache()
        part = Path(target + ".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.rename(target)
