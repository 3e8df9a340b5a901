"""What a donor adds to adaptation where text is scarce: real pairs, every arm and control at equal budget.

    python benchmarks/merge/kit.py                                       # once: the donors' side, see there
    python benchmarks/merge/adaptation.py --device cuda                  # both tasks, three seeds
    python benchmarks/merge/adaptation.py --tasks code --seeds 0 --rows code0.jsonl     # a part, for one of several processes
    python benchmarks/merge/adaptation.py --collect code0.jsonl ...      # writes the result file of the parts

Every arm sees the same few texts in the same order for the same number of steps at the same learning rate, the one of
`RATES` at which plain fine-tuning (`none`) does best on validation text. Of every run the step with the best validation loss
is scored on held-out text. `merge` arms train around a frozen transported residual (attention, as in the paper; gate off, so
that the random donor gets the same chance); `teacher` arms mix the donor's transported next-token distribution into the
loss; in `writer` arms the donor also goes on from the first tokens of every text, so that its lessons are on more text than
there is; `stream` arms draw the target's last states to the donor's transported ones. Each has its random-weights control,
and `own texts` is the writer's: the target itself writes. Arms that the kit or the machine lacks the donor for are left out.
Needs the asset `smollm2` and the kit; the donor's tokenizer for the random writer; neither mergekit, POT nor TRL.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks._results import command_line, write  # noqa: E402
from benchmarks.merge.adaptation_claims import summary  # noqa: E402
from benchmarks.merge.kit import (  # noqa: E402
    PROMPT,
    STATE_STEP,
    TARGET,
    TASKS,
    Gift,
    continuations,
    load_gift,
    load_kit,
    take,
    teach,
    write_texts,
)
from benchmarks.merge.texts import padded  # noqa: E402
from mergekit_ot.adaptation import attach_residuals  # noqa: E402
from mergekit_ot.controls import random_donor  # noqa: E402
from mergekit_ot.teacher import Lesson, distribution_loss, stream_loss  # noqa: E402
from tools.assets import fetch  # noqa: E402


#: Arms, most telling first: whose weights are frozen in, whose predictions are taught, whose stream, who writes text.
ARMS = {
    "none": (None, None, None, None),
    "writer and teacher": (None, "real", None, "real"),
    "shrink": ("zero", None, None, None),
    "own texts": (None, None, None, "target"),
    "teacher": (None, "real", None, None),
    "writer and teacher, random donor": (None, "random", None, "random"),
    "teacher, random donor": (None, "random", None, None),
    "merge": ("real", None, None, None),
    "merge, random donor": ("random", None, None, None),
    "merge and teacher": ("real", "real", None, None),
    "merge and teacher, random donor": ("random", "random", None, None),
    "stream": (None, None, "real", None),
    "stream, random donor": (None, None, "random", None),
}
#: Learning rates tried on `none`; shares of the donor's distribution tried on both donors' `teacher` arms.
RATES, SHARES = (1e-4, 5e-5, 2e-4), (0.5, 0.9)
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


def needs_plans(arm: str) -> bool:
    """Whether an arm takes transported weights or streams."""
    merged, _, stream, _ = ARMS[arm]
    return merged in ("real", "random") or stream is not None


class Bench:
    """One task and seed: the target, the texts, and what the real and the random donor give."""

    def __init__(self, task: str, seed: int, options: argparse.Namespace, keep: Callable[[list], None] = len):
        self.task, self.seed, self.options, self.keep = task, seed, options, keep
        self.kit, self.target = load_kit(options.kit / task), fetch(TARGET)
        self.folder, self.scratch = options.kit / task, tempfile.TemporaryDirectory()
        draw = torch.Generator().manual_seed(seed)
        self.part = torch.randperm(len(self.kit.train), generator=draw)[: options.texts].tolist()
        self.rows: list[dict] = []
        self.give, self.taught, self.written = cache(self.give), cache(self.taught), cache(self.written)

    @cached_property
    def random(self) -> Path:
        """Checkpoint of a donor of the real one's shape with random weights."""
        return random_donor(self.kit.folder / "donor", Path(self.scratch.name) / "random", seed=self.seed)

    def give(self, donor: str) -> Gift:
        """Everything a donor gives; the random one's is made on first use."""
        if donor == "real":
            return load_gift(self.folder / "real.safetensors")
        return take(self.kit, self.target, self.random, self.options.device)

    def taught(self, donor: str) -> list[Lesson]:
        """A donor's lessons on all texts."""
        if donor == "random":
            lessons = teach(self.kit, self.target, self.random, self.options.device).lessons
        else:
            light = self.folder / "lessons.safetensors"
            lessons = load_gift(light).lessons if light.is_file() else self.give("real").lessons
        if len(lessons) != len(self.kit.train):
            raise ValueError(
                f"{self.folder}: {len(lessons)} lessons on {len(self.kit.train)} texts; make the kit anew."
            )
        return lessons

    def written(self, writer: str) -> list[Lesson]:
        """What a donor, or the target itself, writes on from this seed's texts."""
        if writer == "target":
            model = (
                AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32).to(self.options.device).eval()
            )
            prompts = [self.kit.train[i].target_ids[:PROMPT] for i in self.part]
            none = torch.zeros(0, dtype=torch.long)
            return [Lesson(torch.tensor(row), none, none, none) for row in continuations(model, prompts, self.seed)]
        if writer == "real":
            gift = load_gift(self.folder / "written.safetensors")
        else:
            tokenizers = [AutoTokenizer.from_pretrained(path) for path in (self.target, fetch(TASKS[self.task].donor))]
            gift = write_texts(self.kit, self.target, self.random, tokenizers, self.options.device, self.seed)
        return [lesson for lesson, source in zip(gift.lessons, gift.plans["sources"]) if source in self.part]

    def lessons(self, donor: str, stream: bool = False, writer: str | None = None) -> list[Lesson]:
        """This seed's part of a donor's lessons, with states where wanted, and what a writer adds."""
        lessons = self.give(donor).lessons if stream else self.taught(donor)
        return [lessons[i] for i in self.part] + (self.written(writer) if writer else [])

    def weight(self, donor: str, name: str, own: torch.Tensor) -> torch.Tensor | None:
        """Transported weight of a donor by name; zeros for plain shrinking of what it would replace."""
        if donor == "zero":
            return torch.zeros_like(own) if ".self_attn." in name else None
        return self.give(donor).weights.get(name)

    def run(self, arm: str, rate: float, share: float) -> float:
        """Adapt once; returns the best validation loss and keeps the rows."""
        start, options = time.perf_counter(), self.options
        merged, teacher, stream, writer = ARMS[arm]
        model = AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32).to(options.device)
        if merged is not None:
            attach_residuals(model, lambda name, own: self.weight(merged, name, own), options.alpha)
        # without a teacher only the texts of the lessons are used
        lessons = self.lessons(teacher or stream or "real", stream is not None, writer)
        curve = [self._measure(model, 0)]
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        ramp = max(1, options.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / ramp, (options.steps - step) / (options.steps - ramp))
        )
        draw = torch.Generator().manual_seed(self.seed)
        rounds = range(-(-options.steps * options.batch // len(lessons)))
        order = [i for _ in rounds for i in torch.randperm(len(lessons), generator=draw).tolist()]
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
        full = (self.folder / "real.safetensors").is_file()
        for arm in self.options.arms if full else [arm for arm in self.options.arms if not needs_plans(arm)]:
            shares = self.options.shares if ARMS[arm][1] is not None else (0.0,)
            for share in shares if arm != "none" else ():
                try:
                    self.run(arm, rate, share)
                except (torch.OutOfMemoryError, OSError) as error:  # such an arm is left out, the others count
                    print(f"{arm}: {error}", flush=True)
        return self.rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    for name, default in (("texts", 40), ("steps", 96), ("batch", 8), ("every", 8)):
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
