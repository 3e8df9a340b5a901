"""What a donor adds to adaptation on code: Qwen2.5-Coder-0.5B into SmolLM2-135M, every control at equal budget.

    python benchmarks/merge/adaptation.py --device cuda
    python benchmarks/merge/adaptation.py --steps 20 --texts 48 --seeds 1 --eval-tokens 4000      # a look on a CPU

Every arm sees the same texts in the same order for the same number of steps at the same learning rate. `none` is plain
fine-tuning. `merge` arms train around a frozen transported residual (alpha 0.05, all layers, gate off so that the random
donor gets the same chance); `teacher` arms add the donor's transported next-token distribution to the loss. Each has its
random-weights control. Needs the assets `smollm2` and `qwen2.5`; neither mergekit, POT nor TRL.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks._results import command_line, write  # noqa: E402
from benchmarks.merge.code_text import code_chunks  # noqa: E402
from mergekit_ot.adaptation import attach_residuals, fold_residuals  # noqa: E402
from mergekit_ot.anchors import match_text  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.controls import random_donor  # noqa: E402
from mergekit_ot.planning import make_bundle, open_pair  # noqa: E402
from mergekit_ot.report.evaluate import text_loss  # noqa: E402
from mergekit_ot.settings import Calibration, PlanSettings  # noqa: E402
from mergekit_ot.teacher import distribution_loss, prepare_lessons  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from mergekit_ot.vocabulary import vocabulary_plan  # noqa: E402
from tools.assets import fetch  # noqa: E402


#: Arms: whose weights are frozen in, and whose lessons are taught.
ARMS = {
    "none": (None, None),
    "shrink": ("zero", None),
    "merge, random donor": ("random", None),
    "merge": ("real", None),
    "teacher, random donor": (None, "random"),
    "teacher": (None, "real"),
    "merge and teacher": ("real", "real"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, default in (
        ("steps", 200),
        ("texts", 256),
        ("batch", 8),
        ("seeds", 3),
        ("length", 256),
        ("eval-tokens", 16384),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--teacher-weight", type=float, default=0.7)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def lessons_of(folder: Path, pair_texts, plan, size: int, device: str):
    donor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    made = prepare_lessons(donor.to(device).eval(), pair_texts, plan, size)
    del donor
    gc.collect()
    return made


def transporter_of(target: Path, donor: Path, scratch: Path, seed: int, device: str) -> Transporter:
    pair = open_pair(str(target), str(donor))
    settings = PlanSettings(residual_map="procrustes", solver="entropic")
    calibration = Calibration(str(scratch / "calibration.jsonl"), seed=seed)
    bundle = make_bundle(pair, calibration, settings, scratch / "plans", device=device, quiet=True)
    return Transporter(bundle, pair.target, pair.donor, CheckpointReader(target), CheckpointReader(donor))


def adapt(model, lessons, options: argparse.Namespace, seed: int, teach: bool) -> None:
    """Plain AdamW; with lessons the loss is a mixture of the text's next tokens and the donor's distribution."""
    share = options.teacher_weight if teach else 0.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, 1.0, total_iters=max(1, options.steps // 10))
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(options.steps):
        optimiser.zero_grad()
        for i in torch.randint(0, len(lessons), (options.batch,), generator=draw).tolist():
            lesson = lessons[i]
            ids = lesson.ids.to(options.device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            loss = (1 - share) * torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
            if share:
                answers = lesson.tokens.to(ids.device), lesson.probabilities.to(ids.device)
                loss = loss + share * distribution_loss(logits[lesson.rows.to(ids.device)], *answers)
            (loss / options.batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        warmup.step()
    model.eval()


def one_seed(seed: int, options: argparse.Namespace, scratch: Path) -> list[dict]:
    target, donor = fetch("smollm2"), fetch("qwen2.5")
    folders = {"real": donor, "random": random_donor(donor, scratch / "random_donor", seed=seed)}
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (target, donor)]
    chunks = code_chunks(seed)
    (scratch / "calibration.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in chunks["calibration"]))
    texts = [match_text(t, *tokenizers, max_length=options.length, skip=0) for t in chunks["train"][: options.texts]]
    shape = open_pair(str(target), str(donor))
    plan = vocabulary_plan(*tokenizers, shape.donor.vocab_size)
    lessons, transports = {}, {"zero": lambda name, weight: torch.zeros_like(weight) if ".layers." in name else None}
    for name, folder in folders.items():
        lessons[name] = lessons_of(folder, texts, plan, shape.target.vocab_size, options.device)
        if any(ARMS[arm][0] == name for arm in options.arms):
            place = scratch / name
            place.mkdir()
            (place / "calibration.jsonl").symlink_to(scratch / "calibration.jsonl")
            transports[name] = transporter_of(target, folder, place, seed, options.device).transport
    rows = []
    for arm in options.arms:
        weights, teacher = ARMS[arm]
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(options.device).eval()
        if weights is not None:
            attach_residuals(model, transports[weights], options.alpha)
        for when in ("before", "after"):
            if when == "after":
                adapt(model, lessons[teacher or "real"], options, seed, teach=teacher is not None)
                fold_residuals(model)
            loss, count = text_loss(
                model, tokenizers[0], chunks["eval"], max_tokens=options.eval_tokens, max_length=options.length
            )
            rows.append({"arm": arm, "when": when, "seed": seed, "metric": "nll", "value": loss, "tokens": count})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    options = arguments()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            rows += one_seed(seed, options, Path(scratch))
    rows += [
        {"metric": f"budget: {name.replace('_', ' ')}", "value": value}
        for name, value in vars(options).items()
        if isinstance(value, (int, float))
    ]
    print(
        write(
            "merge_adaptation", rows, "benchmarks.merge.adaptation_claims", command_line(), list(range(options.seeds))
        )
    )


if __name__ == "__main__":
    main()
