"""What a DPO step costs with parallel prompts in ten languages, as a ratio to the stock step of the same run.

    python benchmarks/mlc/step_cost.py           # Qwen2.5-0.5B in bfloat16 on one GPU
    python benchmarks/mlc/step_cost.py --tiny    # a minute on a CPU: proves that it runs

Rows look like preference data: answers several times as long as prompts, both of log-normal length. Prompts are real
parallel text (concepts of CLDR, as many as reach the length in English), so each language has its own number of tokens;
answers are English prose. All variants are built first, each with weights of its own, and take turns: every optimizer step
is made by one after the other, on the same rows, in an order that rotates, so that what a machine does meanwhile falls on
all. The whole is gone through several times. The first time is kept apart: on a GPU every shape of a batch that was not
seen before costs plans and kernels. A step's time is the median over the other times, and a variant's the mean over its
steps, of which every second one has the term (`mlc_every`), each in languages of its own draw. Peak memory is what a variant keeps (weights,
reference, optimizer) and the most that one of its steps allocates above that.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.mlc.concepts import load_concepts
from benchmarks.mlc.step_cost_claims import claims
from tools.assets import fetch
from tools.result_files import RESULTS, command_line, write
from trl_mlc.collator import KEY, select_prompts
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
    parser.add_argument("--steps", type=int, default=12, help="different steps, an even number")
    parser.add_argument("--rounds", type=int, default=3, help="how often the steps are timed, after a first time")
    parser.add_argument("--stop-seconds", type=float, default=float("inf"), help="begin no round that would end later")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="median, in English")
    parser.add_argument("--response-tokens", type=int, default=192, help="median")
    parser.add_argument("--no-checkpointing", action="store_true", help="TRL checkpoints activations by default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    options = parser.parse_args()
    if options.random and options.layer == "auto":
        parser.error("--random needs --layer: on random weights, 'auto' chooses nothing.")
    if options.tiny:
        options.model, options.dtype, options.batch, options.steps, options.rounds = "smollm2", "float32", 1, 4, 2
        options.prompt_tokens, options.response_tokens, options.random, options.layer = 8, 24, True, 3
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


def random_weights(folder: str, dtype: str, target: str, layers: int | None = None) -> str:
    """A model of the folder's config (with fewer layers, if asked) and random weights, saved in `target`."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.update({"num_hidden_layers": layers} if layers else {})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
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


class Lane(NamedTuple):
    """One variant, ready to make its steps."""

    trainer: MLCDPOTrainer
    model: Any
    optimizer: torch.optim.Optimizer
    batches: list[dict]


def lane(trainer: MLCDPOTrainer, steps: int) -> Lane:
    """The first batches of a trainer, and what `train()` does before its first step."""
    torch.manual_seed(0)  # of the order of rows
    batches = iter(trainer.get_train_dataloader())
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Lane(trainer, model, optimizer, [next(batches) for _ in range(steps)])


def step(lane: Lane, number: int) -> tuple[float, int | None]:
    """Seconds of one optimizer step, and the bytes it allocates on a GPU above what was there."""
    gpu = torch.cuda.is_available()
    lane.trainer.state.global_step = number
    batch = copy.deepcopy(lane.batches[number])  # the loss takes the prompts out of it
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    lane.trainer.training_step(lane.model, batch)
    torch.nn.utils.clip_grad_norm_(lane.model.parameters(), 1.0)
    lane.optimizer.step()
    lane.optimizer.zero_grad()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if gpu else None


def kept_bytes(lane: Lane) -> int:
    """What a variant holds between steps: weights of both models and the optimizer's state."""
    held = [*lane.model.parameters(), *lane.model.buffers()]
    held += [*lane.trainer.ref_model.parameters(), *lane.trainer.ref_model.buffers()]
    held += [v for state in lane.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def summary(rounds: list[list[float]], extra: list[int | None], kept: int) -> list[dict]:
    """Rows of one variant: `rounds[0]` are the seconds of its steps for the first time, the others are timed."""
    first, *timed = rounds
    rows = [{"metric": "seconds_per_step_of_new_shapes", "value": statistics.fmean(first)}]
    if timed:
        typical = [statistics.median(times) for times in zip(*timed, strict=True)]
        means = [statistics.fmean(times) for times in timed]
        spread = {"spread": statistics.stdev(means)} if len(means) > 1 else {}
        rows.append({"metric": "seconds_per_step", "value": statistics.fmean(typical), **spread, "rounds": len(timed)})
        rows += [{"metric": "seconds_of_step", "step": i, "value": value} for i, value in enumerate(typical)]
    most = [e for e in extra if e is not None]
    memory = {} if most else {"note": "allocated bytes are counted on a GPU only"}
    return [*rows, {"metric": "peak_bytes", "value": kept + max(most) if most else None, **memory}]


def token_counts(trainer: MLCDPOTrainer) -> dict[str, float]:
    """Real tokens per row: preference pair, and parallel prompts."""
    rows = list(trainer.train_dataset)
    pair = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    found = {"pair_tokens_per_row": statistics.fmean(pair)}
    found["prompt_tokens_per_row"] = statistics.fmean(len(r["prompt_ids"]) for r in rows)
    if "mlc_input_ids" in rows[0]:
        found["parallel_tokens_per_row"] = statistics.fmean(sum(map(len, r["mlc_input_ids"])) for r in rows)
    return found


def tokens_of_step(lane: Lane, number: int) -> int:
    """Tokens of the parallel prompts that a step runs."""
    trainer, prompts = lane.trainer, lane.batches[number].get(KEY)
    if prompts is None or number % trainer.args.mlc_every:
        return 0
    if trainer.args.mlc_languages_per_step is not None:
        trainer.state.global_step = number
        prompts = select_prompts(prompts, trainer._mlc_of_this_step())
    return sum(prompts["lengths"])


def check_same_rows(lanes: dict[str, Lane]) -> None:
    """Raise unless all variants step on the same pairs."""
    one, *others = lanes.values()
    for other in others:
        if not all(
            torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.batches, other.batches, strict=True)
        ):
            raise RuntimeError("The variants do not step on the same rows.")


def main() -> None:
    options, began = parse(), time.perf_counter()
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scratch = tempfile.TemporaryDirectory()
    if options.random:
        folder = random_weights(folder, options.dtype, scratch.name, 4 if options.tiny else None)
    data = make_rows(tokenizer, options, options.steps * options.batch)
    name = "mlc_step_cost" + ("_tiny" if options.tiny else "")
    source = "benchmarks.mlc." + ("no_claims" if options.tiny else "step_cost_claims")
    lanes = {}
    for variant in options.variants:
        lanes[variant] = lane(build(folder, tokenizer, data, variant, options, scratch.name), options.steps)
    check_same_rows(lanes)
    tag = {"batch": options.batch, "model": Path(options.model).name, "dtype": options.dtype}
    tag |= {"weights": "random" if options.random else "trained", "checkpointing": str(not options.no_checkpointing)}
    facts = []
    for variant, made in lanes.items():
        facts += [{"variant": variant, "metric": m, "value": v} for m, v in token_counts(made.trainer).items()]
        for i in range(options.steps):
            found = {"metric": "parallel_tokens_of_step", "step": i, "value": tokens_of_step(made, i)}
            facts += [{"variant": variant, **found}] if made.trainer._mlc_pass is not None else []
        if made.trainer._mlc_pass is not None:
            facts.append({"variant": variant, "metric": "layer", "value": made.trainer._mlc_pass.layer})
    seconds: dict[str, list[list[float]]] = {variant: [] for variant in lanes}
    extra: dict[str, list[int | None]] = {variant: [] for variant in lanes}
    for turn in range(options.rounds + 1):
        start = time.perf_counter()
        for variant in lanes:
            seconds[variant].append([])
        for number in range(options.steps):
            order = [*lanes][(shift := (turn + number) % len(lanes)) :] + [*lanes][:shift]
            for variant in order:
                took, bytes_above = step(lanes[variant], number)
                seconds[variant][turn].append(took)
                extra[variant] += [bytes_above] if turn else []
        rows = [
            {**tag, "variant": variant, **row}
            for variant in lanes
            for row in summary(seconds[variant], extra[variant], kept_bytes(lanes[variant]))
        ]
        rows += [{**tag, **fact} for fact in facts]
        write(name, rows, source, command_line(), [0], folder=options.folder)  # a stop loses only what comes after
        for variant in lanes:
            print(f"{turn} {variant:20}", " ".join(f"{s:.3f}" for s in seconds[variant][turn]), flush=True)
        now = time.perf_counter()
        if now - began + (now - start) > options.stop_seconds:
            break
    for row in rows:
        if row["metric"] in ("seconds_per_step", "peak_bytes"):
            print(f"{row['variant']:28} {row['metric']} {row['value']} +- {row.get('spread', 0):.4f}")
    for found in claims(rows):
        print(f"{found['id']:35} {found['value']:.3f} {found['compare']} {found['target']} holds={found['holds']}")


if __name__ == "__main__":
    main()
