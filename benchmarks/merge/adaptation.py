"""What a donor adds to adaptation where text is scarce: real pairs, every arm and control at equal budget.

    python benchmarks/merge/kit.py                                       # once: the donors' side, see there
    python benchmarks/merge/adaptation.py --device cuda                  # both tasks, three seeds
    python benchmarks/merge/adaptation.py --tasks code --seeds 0 --rows code0.jsonl     # a part, for one of several processes
    python benchmarks/merge/adaptation.py --collect code0.jsonl ...      # writes the result file of the parts

Every arm sees the same few texts in the same order for the same number of steps at the same learning rate, the one of
`RATES` at which plain fine-tuning (`none`) does best on validation text. Of every run the step with the best validation loss
is scored on held-out text. `merge` arms train around a frozen transported residual (attention, as in the paper; gate off, so
that the random donor gets the same chance); `teacher` arms mix the donor's transported next-token distribution into the
loss; `stream` arms draw the target's last states to the donor's transported ones. Each has its random-weights control.
Needs the asset `smollm2` and the kit; neither the donors nor mergekit, POT and TRL.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks._results import command_line, write  # noqa: E402
from benchmarks.merge.adaptation_claims import summary  # noqa: E402
from benchmarks.merge.kit import STATE_STEP, TARGET, TASKS, Gift, load_gift, load_kit, take  # noqa: E402
from benchmarks.merge.texts import padded  # noqa: E402
from mergekit_ot.adaptation import attach_residuals  # noqa: E402
from mergekit_ot.controls import random_donor  # noqa: E402
from mergekit_ot.teacher import Lesson, distribution_loss, stream_loss  # noqa: E402
from tools.assets import fetch  # noqa: E402


#: Arms, most telling first: whose weights are frozen in, whose predictions are taught, whose stream.
ARMS = {
    "none": (None, None, None),
    "teacher": (None, "real", None),
    "teacher, random donor": (None, "random", None),
    "merge": ("real", None, None),
    "merge, random donor": ("random", None, None),
    "shrink": ("zero", None, None),
    "merge and teacher": ("real", "real", None),
    "merge and teacher, random donor": ("random", "random", None),
    "stream": (None, None, "real"),
    "stream, random donor": (None, None, "random"),
}
#: Learning rates tried on `none`; shares of the donor's distribution tried on both donors' `teacher` arms.
RATES, SHARES = (5e-5, 1e-4, 2e-4, 4e-4), (0.5, 0.9)
STREAM_WEIGHT = 1.0


def run_model(model, ids: torch.Tensor, states: bool = False):
    """Forward in bfloat16 on a GPU, in float32 elsewhere."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(input_ids=ids, use_cache=False, output_hidden_states=states)


@torch.no_grad()
def score(model, texts: list[list[int]], device: str) -> float:
    """Mean next-token loss in nats."""
    batch = 32 if device.startswith("cuda") else 4
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        ids, labels = padded(texts[start : start + batch], device)
        logits = run_model(model, ids).logits.float().flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    model.train()
    return total / count


def lesson_losses(output, lessons: list[Lesson], taught: bool) -> torch.Tensor:
    """Mean of the lessons' losses over a batch: on predictions, or on the stream."""
    source = output.logits if taught else output.hidden_states[-2]
    rows = [one.rows if taught else one.rows[::STATE_STEP] for one in lessons]
    picked = torch.cat([source[i, where.to(source.device)] for i, where in enumerate(rows)])
    names = ("tokens", "probabilities") if taught else ("states",)
    answers = [torch.cat([getattr(one, name) for one in lessons]).to(source.device) for name in names]
    return distribution_loss(picked, *answers) if taught else stream_loss(picked, *answers)


class Bench:
    """One task and seed: the target, the texts, and what the real and the random donor give."""

    def __init__(self, task: str, seed: int, options: argparse.Namespace, keep: Callable[[list], None] = len):
        self.task, self.seed, self.options, self.keep = task, seed, options, keep
        self.kit, self.target = load_kit(options.kit / task), fetch(TARGET)
        self.gifts = {"real": load_gift(options.kit / task / "real.safetensors")}
        draw = torch.Generator().manual_seed(seed)
        self.part = torch.randperm(len(self.gifts["real"].lessons), generator=draw)[: options.texts].tolist()
        self.rows: list[dict] = []

    def give(self, donor: str) -> Gift:
        """What a donor gives; the random one is made on first use."""
        if donor not in self.gifts:
            with tempfile.TemporaryDirectory() as scratch:
                folder = random_donor(self.kit.folder / "donor", Path(scratch) / "random", seed=self.seed)
                self.gifts[donor] = take(self.kit, self.target, folder, self.options.device)
        return self.gifts[donor]

    def lessons(self, donor: str) -> list[Lesson]:
        """This seed's part of a donor's lessons."""
        lessons = self.give(donor).lessons
        return [lessons[i] for i in self.part]

    def weights(self, donor: str) -> dict[str, torch.Tensor]:
        """Transported weights of a donor; zeros for plain shrinking."""
        if donor == "zero":
            return {name: torch.zeros_like(weight) for name, weight in self.give("real").weights.items()}
        return self.give(donor).weights

    def run(self, arm: str, rate: float, share: float) -> float:
        """Adapt once; returns the best validation loss and keeps the rows."""
        start, options = time.perf_counter(), self.options
        merged, teacher, stream = ARMS[arm]
        model = AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32).to(options.device)
        if merged is not None:
            weights = self.weights(merged)
            attach_residuals(model, lambda name, _: weights.get(name), options.alpha)
        lessons = self.lessons(teacher or stream or "real")  # without a teacher only their texts are used
        curve = [self._measure(model, 0)]
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        ramp = max(1, options.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / ramp, (options.steps - step) / (options.steps - ramp))
        )
        draw = torch.Generator().manual_seed(self.seed)
        order = [i for _ in range(options.steps) for i in torch.randperm(len(lessons), generator=draw).tolist()]
        for step in range(options.steps):
            batch = [lessons[i] for i in order[step * options.batch : (step + 1) * options.batch]]
            ids, labels = padded([one.ids for one in batch], options.device)
            output = run_model(model, ids, states=stream is not None)
            loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten())
            if teacher is not None:
                loss = (1 - share) * loss + share * lesson_losses(output, batch, taught=True)
            if stream is not None:
                loss = loss + STREAM_WEIGHT * lesson_losses(output, batch, taught=False)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                curve.append(self._measure(model, step + 1))
        best = min(curve[1:], key=lambda point: point["valid"])
        common = {"task": self.task, "arm": arm, "seed": self.seed, "rate": rate}
        common |= {"share": share} if teacher is not None else {}
        for when, point in (("before", curve[0]), ("after", best), ("last", curve[-1])):
            place = common | {"when": when, "step": point["step"]}
            self.rows += [place | {"metric": name, "value": point[name]} for name in ("valid", "nll")]
        self.keep(self.rows)  # a run that is cut off leaves what it has
        print(self.rows[-3], f"{time.perf_counter() - start:.1f} s", flush=True)
        return best["valid"]

    def _measure(self, model, step: int) -> dict:
        texts = {"valid": self.kit.valid, "nll": self.kit.scored}
        return {"step": step} | {name: score(model, rows, self.options.device) for name, rows in texts.items()}

    def all_arms(self) -> list[dict]:
        """The learning rate on the control without a donor, then every arm at that rate."""
        rates = {rate: self.run("none", rate, 0.0) for rate in self.options.rates}
        rate = min(rates, key=rates.get)
        for arm in self.options.arms:
            shares = self.options.shares if ARMS[arm][1] is not None else (0.0,)
            for share in shares if arm != "none" else ():
                try:
                    self.run(arm, rate, share)
                except torch.OutOfMemoryError as error:  # an arm that does not fit is left out, the others count
                    print(f"{arm}: {error}", flush=True)
        return self.rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    for name, default in (("texts", 40), ("steps", 96), ("batch", 8), ("every", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--kit", type=Path, default=Path("kit"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=Path, help="write rows here, one JSON object per line, and no result file")
    parser.add_argument("--collect", type=Path, nargs="*", help="write the result file of these rows and stop")
    parser.add_argument("--name", default="merge_adaptation", help="of the result file")
    return parser.parse_args()


def budget(options: argparse.Namespace) -> list[dict]:
    """What every arm is given."""
    numbers = {name: getattr(options, name) for name in ("texts", "steps", "batch", "alpha")}
    for task in options.tasks:
        kit = load_kit(options.kit / task)
        numbers |= {f"{task}: texts to draw from": len(kit.train), f"{task}: scored texts": len(kit.scored)}
        numbers[f"{task}: tokens per text"] = sum(len(text.target_ids) for text in kit.train) / len(kit.train)
    return [{"metric": f"budget: {name}", "value": value} for name, value in numbers.items()]


def main() -> None:
    options = arguments()
    rows = []
    if options.collect:
        lines = [line for path in options.collect for line in path.read_text().splitlines() if line.strip()]
        rows = list({line: json.loads(line) for line in lines}.values())
    else:
        numbers = budget(options)

        def keep(new: list[dict]) -> None:
            if options.rows:
                options.rows.write_text("".join(json.dumps(row) + "\n" for row in [*numbers, *rows, *new]))

        for task in options.tasks:
            for seed in options.seeds:
                rows += Bench(task, seed, options, keep).all_arms()
        rows += numbers
    if not options.rows:
        seeds = sorted({row["seed"] for row in rows if "seed" in row})
        rows += summary(rows)
        print(write(options.name, rows, "benchmarks.merge.adaptation_claims", command_line(), seeds))


if __name__ == "__main__":
    main()
