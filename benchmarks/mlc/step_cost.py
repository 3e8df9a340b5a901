"""What a DPO step costs with parallel prompts in ten languages, as a ratio to the stock step of the same run.

    python benchmarks/mlc/step_cost.py           # Qwen2.5-0.5B in bfloat16 on one GPU
    python benchmarks/mlc/step_cost.py --tiny    # a minute on a CPU: proves that it runs

Rows look like preference data: answers several times as long as prompts, both of log-normal length. Prompts are real
parallel text (concepts of CLDR, as many as reach the length in English), so each language has its own number of tokens;
answers are English prose. Every variant makes the same optimizer steps on the same rows, one after another, the stock
trainer first and last. Each variant makes its steps twice, and the second time is timed: on a GPU every shape of a batch
that was not seen before costs plans and kernels, and the stock trainer would pay for most of them as the first to come. A
variant's time is the median over pairs of consecutive steps, of which one in each has the term; the first time is kept, too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks._results import RESULTS, command_line, write
from benchmarks.mlc.concepts import load_concepts
from benchmarks.mlc.step_cost_claims import claims
from tools.assets import fetch
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer


LANGUAGES = ("de", "es", "ru", "zh", "ar", "hi", "bn", "sw", "ur")  # with English: ten
VARIANTS = {
    "stock": {"mlc_weight": 0.0},
    "default": {},
    "three-languages": {"mlc_languages_per_step": 3},
    "every-step": {"mlc_every": 1},
    "every-step,three-languages": {"mlc_every": 1, "mlc_languages_per_step": 3},
    "last-layer": {"mlc_layer": -1},
    "divided": {"mlc_buckets": 6},
    "one-bucket": {"mlc_buckets": 1},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5", help="asset name or folder")
    parser.add_argument(
        "--random",
        action="store_true",
        help="draw the weights at random (--model needs only its config and tokenizer): cost does not depend on them, "
        "but 'auto' does, so name a --layer",
    )
    parser.add_argument("--layer", default="auto", help="mlc_layer of all variants but last-layer")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; computation is bfloat16 on a GPU")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="timed steps per variant, an even number")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="median, in English")
    parser.add_argument("--response-tokens", type=int, default=192, help="median")
    parser.add_argument("--no-checkpointing", action="store_true", help="TRL checkpoints activations by default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    options = parser.parse_args()
    if options.random and options.layer == "auto":
        parser.error("--random needs --layer: on random weights, 'auto' chooses nothing.")
    if options.tiny:
        options.model, options.dtype, options.batch, options.steps = "smollm2", "float32", 1, 4
        options.prompt_tokens, options.response_tokens = 8, 24
        options.variants = ["stock", "default", "three-languages"]
    return options


def make_rows(tokenizer, options, count: int) -> Dataset:
    """Conversational preference rows with nine translations each."""
    draw = random.Random(0)
    concepts = load_concepts(fetch("concepts"), LANGUAGES)
    prose = tokenizer(text=(fetch("handbook") / "text.txt").read_text(encoding="utf-8")[:400_000])["input_ids"]

    def length(median: int) -> int:
        return max(4, round(median * draw.lognormvariate(0, 0.5)))

    def words(concept: dict, language: str) -> str:
        text = concept["texts"][language]
        return ", ".join([text["name"], *text["keywords"][:3]])

    def answer() -> str:
        size = length(options.response_tokens)
        start = draw.randrange(len(prose) - size)
        return tokenizer.decode(prose[start : start + size])

    rows = []
    for _ in range(count):
        wanted, chosen, size = length(options.prompt_tokens), [], 0
        while size < wanted:
            chosen.append(draw.choice(concepts))
            size += len(tokenizer(text=words(chosen[-1], "en"))["input_ids"])
        texts = {name: "; ".join(words(c, name) for c in chosen) for name in ("en", *LANGUAGES)}
        row = {"prompt": [{"role": "user", "content": texts.pop("en")}], "prompt_translations": texts}
        rows.append(row | {side: [{"role": "assistant", "content": answer()}] for side in ("chosen", "rejected")})
    return Dataset.from_list(rows)


def random_weights(folder: str, dtype: str, target: str) -> str:
    """A model of the folder's config with random weights, saved in `target`."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    return target


def build(folder: str, tokenizer, data: Dataset, variant: str, options, scratch: str) -> MLCDPOTrainer:
    gpu = torch.cuda.is_available()
    args = MLCDPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=options.batch,
        max_length=2048,
        bf16=gpu,
        gradient_checkpointing=not options.no_checkpointing,
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **{"mlc_layer": options.layer, **VARIANTS[variant]},
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype) for _ in range(2))
    return MLCDPOTrainer(model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)


def time_steps(trainer: MLCDPOTrainer, warmup: int, steps: int) -> tuple[list[float], list[float], int | None]:
    """Seconds of each optimizer step after a warm-up, for the first and the second time, and the peak of allocated bytes."""
    gpu = torch.cuda.is_available()
    batches = iter(trainer.get_train_dataloader())
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model, runs = trainer.model.train(), []
    if trainer.args.gradient_checkpointing:  # what `train()` does before its first step
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = [next(batches) for _ in range(warmup + steps)]
    for timed in (False, True):  # the same steps twice: a shape is not new when it is timed
        trainer.state.global_step, seconds = 0, []
        for i, batch in enumerate(whole):
            if gpu and i == warmup and timed:
                torch.cuda.reset_peak_memory_stats()
            batch = copy.deepcopy(batch)  # the loss takes the prompts out of it
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            trainer.training_step(model, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            trainer.state.global_step += 1
        runs.append(seconds[warmup:])
    return *runs, torch.cuda.max_memory_allocated() if gpu else None


def token_counts(trainer: MLCDPOTrainer) -> dict[str, float]:
    """Real tokens per row: preference pair, and parallel prompts."""
    rows = list(trainer.train_dataset)
    pair = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    found = {"pair_tokens_per_row": statistics.fmean(pair)}
    found["prompt_tokens_per_row"] = statistics.fmean(len(r["prompt_ids"]) for r in rows)
    if "mlc_input_ids" in rows[0]:
        found["parallel_tokens_per_row"] = statistics.fmean(sum(map(len, r["mlc_input_ids"])) for r in rows)
    return found


def main() -> None:
    options = parse()
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = tempfile.TemporaryDirectory()
    if options.random:
        folder = random_weights(folder, options.dtype, drawn.name)
    warmup = 2 if options.tiny else 4
    data = make_rows(tokenizer, options, (warmup + options.steps) * options.batch)
    name = "mlc_step_cost" + ("_tiny" if options.tiny else "")
    source = "benchmarks.mlc." + ("no_claims" if options.tiny else "step_cost_claims")
    rows = []
    for run, variant in enumerate([*options.variants, "stock"]):
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build(folder, tokenizer, data, variant, options, scratch)
            first, seconds, peak = time_steps(trainer, warmup, options.steps)
        tag = {
            "variant": variant,
            "run": run,
            "batch": options.batch,
            "model": Path(options.model).name,
            "dtype": options.dtype,
        }
        tag["weights"] = "random" if options.random else "trained"
        tag["checkpointing"] = str(not options.no_checkpointing)
        for metric, times in (("seconds_per_step", seconds), ("seconds_per_step_of_new_shapes", first)):
            pairs = [statistics.fmean(pair) for pair in zip(times[::2], times[1::2], strict=True)]  # mlc_every is 2
            typical, spread = statistics.median(pairs), statistics.stdev(pairs)
            rows.append({**tag, "metric": metric, "value": typical, "spread": spread})
            print(f"{variant:28} {typical:.4f} s/step +- {spread:.4f}  {metric}", peak, flush=True)
        memory = {} if peak is not None else {"note": "allocated bytes are counted on a GPU only"}
        rows.append({**tag, "metric": "peak_bytes", "value": peak, **memory})
        rows += [{**tag, "metric": name, "value": value} for name, value in token_counts(trainer).items()]
        if trainer._mlc_pass is not None:
            rows.append({**tag, "metric": "layer", "value": trainer._mlc_pass.layer})
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        write(name, rows, source, command_line(), [0], folder=options.folder)  # after each: a stop loses only the rest
    for found in claims(rows):
        print(f"{found['id']:35} {found['value']:.3f} {found['compare']} {found['target']} holds={found['holds']}")


if __name__ == "__main__":
    main()
