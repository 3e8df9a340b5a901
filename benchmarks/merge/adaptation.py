"""What a donor adds to adaptation where text is scarce: real pairs, every arm and control at equal budget.

    python benchmarks/merge/kit.py                                       # once: the texts, see there
    python benchmarks/merge/adaptation.py --device cuda --rows rows-0.jsonl --scratch scratch     # one of several processes
    python benchmarks/merge/adaptation.py --collect rows-*.jsonl         # writes the result file of what they measured

Within a group of `PLAN` every arm has the same texts, the same number of steps of the same number of texts and the same choice
of settings (learning rate and length of the schedule; with a teacher also the share of its lessons), and takes the setting and
the step that are best on validation text; it is scored on held-out text. `merge` arms train around a frozen transported
residual (attention, as in the paper; gate off, so that the random donor gets the same chance); `teacher` arms mix the donor's
next-token distribution, carried by the vocabulary plan, into the loss; in `writer` arms the donor also goes on from the first
tokens of every text, and a fixed part of every batch is what it wrote; `stream` arms draw the target's last states to the
donor's transported ones. Controls: the same from a donor with random weights, the same from the target itself (`own`: every
effect but that of the donor's knowledge), the donor's lessons dealt out to other positions (`shuffled`: what it expects
anywhere), shrinking alone, and no donor at all. Processes that share `--scratch` share the work, on any number of GPUs.
Needs the assets `smollm2`, `qwen2.5` and `gemma3-270m`, and the kit; neither mergekit, POT nor TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.merge.adaptation_claims import summary  # noqa: E402
from benchmarks.merge.adaptation_loss import draws, joined, lesson_loss, score  # noqa: E402
from benchmarks.merge.adaptation_plan import ARMS, Job, Setting, groups, measured, setting  # noqa: E402
from benchmarks.merge.gifts import TEMPERATURE, WRITINGS, WRITTEN, Givers, Lessons, shuffled  # noqa: E402
from benchmarks.merge.kit import TARGET, TASKS, digest, load_kit  # noqa: E402
from mergekit_ot.adaptation import attach_residuals  # noqa: E402
from tools.assets import ROOT, fetch  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


#: Of a batch in `writer` arms, the part that is the given texts.
GIVEN = 0.25
#: Texts in memory at once; larger batches are summed from such parts.
AT_ONCE = 16
#: A run ends early when so many scorings in a row were no better than the best one before.
PATIENCE = 5
#: Times that a job is tried when the GPU is full of other processes, and the seconds in between.
TRIES, PAUSE = 8, 5.0
#: Steps after which a model is scored; the last is always one.
SCORED_AFTER = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768)


class Bench:
    """The work on some tasks, seeds and arms, shared with other processes through a scratch folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.target, self._givers, self._kept = options, fetch(TARGET), {}, {}
        options.scratch.mkdir(parents=True, exist_ok=True)

    def givers(self, task: str) -> Givers:
        if task not in self._givers:
            self._givers[task] = Givers(load_kit(self.options.kit / task), self.options.scratch, self.options.device)
        return self._givers[task]

    def part(self, job: Job) -> list[int]:
        """Which texts of the kit a seed adapts on."""
        count = len(self.givers(job.task).kit.train)
        return torch.randperm(count, generator=torch.Generator().manual_seed(job.seed))[: job.texts].tolist()

    # --- jobs ---------------------------------------------------------------------------------------------------------
    def path(self, job: Job, gift: str) -> Path:
        """File of a gift: lessons and plans are the same for all numbers of texts, the real donor's for all seeds."""
        name = f"{job.task} {gift}"
        if gift.startswith("written"):
            name += f" of {job.texts}"
        if "random" in gift or gift.startswith("written"):
            name += f" seed {job.seed}"
        return self.options.scratch / f"{name}.pt".replace(" ", "-")

    def jobs(self) -> list[Job]:
        """Everything to do: group by group, what it needs first; without what an earlier call has measured."""
        done = measured(self.options.resume)
        jobs = [job for task in self.options.tasks if (job := Job(task, 0, 0, "lead")) not in done]
        prepared: set[Path] = set()
        for group in groups(self.options):
            runs: list[Job] = []
            for name in group["arms"]:
                for seed in group["seeds"]:
                    for task in group["tasks"]:
                        texts = min(group["texts"], len(self.givers(task).kit.train))
                        shares = group["shares"] if ARMS[name].teacher else [0.0]
                        choices = [Setting(*setting, share) for setting in group["settings"] for share in shares]
                        left = [job for choice in choices if (job := Job(task, seed, texts, name, choice)) not in done]
                        for gift in ARMS[name].needs() if left else []:
                            made = Job(task, seed, texts, gift)
                            if self.path(made, gift) not in prepared:
                                prepared.add(self.path(made, gift))
                                jobs.append(made)
                        runs += left
            jobs += runs
        return list(dict.fromkeys(jobs))

    def claim_file(self, job: Job) -> Path:
        """The file whose maker does the job."""
        name = f"{job}" if job.setting else self.path(job, job.name).name
        return self.options.scratch / f"claim {name}".replace("/", "-")

    def claim(self, job: Job) -> bool:
        """Whether this process is the one that does it."""
        try:
            os.close(os.open(self.claim_file(job), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def work(self) -> None:
        """Do what is left to do and not done by others, as soon as what it needs is there."""
        waiting, tries = self.jobs(), {}
        while waiting:
            for job in list(waiting):
                paths = [self.path(job, gift) for gift in ARMS[job.name].needs()] if job.setting else []
                if any(path.with_suffix(".failed").exists() for path in paths):
                    waiting.remove(job)
                elif all(path.exists() for path in paths) and self.ready(job):
                    waiting.remove(job)
                    if self.claim(job):
                        tries[job] = tries.get(job, 0) + 1
                        if not self.do(job) and tries[job] < TRIES:  # others filled the GPU: later, after the rest
                            self.claim_file(job).unlink()
                            waiting.append(job)
                            time.sleep(PAUSE)
                        break
            else:
                time.sleep(0.5)

    def ready(self, job: Job) -> bool:
        """With `--late-assets`, whether the checkpoint that a job reads has come."""
        if not self.options.late_assets or job.setting or job.name.endswith(" target"):
            return True
        return (ROOT / TASKS[job.task].donor).is_dir()

    def do(self, job: Job) -> bool:
        """Prepare a gift or run an arm; what fails is left out, with what needs it. False where memory was short."""
        start = time.perf_counter()
        try:
            if job.setting:
                self.run(job)
            else:
                self.give(job)
        except torch.OutOfMemoryError as error:
            print(f"{job}: {error}", flush=True)
            return False
        except Exception as error:
            traceback.print_exc()
            print(f"{job}: {error}", flush=True)
            if not job.setting:
                self.path(job, job.name).with_suffix(".failed").touch()
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # processes share the GPU
        print(f"[{time.strftime('%H:%M:%S')}] {job}: {time.perf_counter() - start:.1f} s", flush=True)
        return True

    def give(self, job: Job) -> None:
        """Prepare a gift."""
        if job.name == "lead":
            donor = TASKS[job.task].donor
            return self.write(
                [{"task": job.task, "donor": donor, "metric": "lead", "value": self.givers(job.task).lead()}]
            )
        kind, giver, *shared = job.name.split()
        givers, path = self.givers(job.task), self.path(job, job.name)
        if kind == "lessons":
            gift = givers.lessons(giver, job.seed, inside=not shared)
        elif kind == "written":
            gift = givers.written(giver, job.seed, self.part(job))
        else:
            gift = givers.plans(giver, job.seed)
        torch.save(gift, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def write(self, rows: list[dict]) -> None:
        """Add rows to this process's file."""
        with self.options.rows.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def gift(self, job: Job, name: str):
        """A prepared gift, kept while jobs of its task and seed follow each other."""
        path = self.path(job, name)
        if path not in self._kept:
            if len(self._kept) >= 4:
                self._kept.pop(next(iter(self._kept)))
            self._kept[path] = torch.load(path, weights_only=False)
        return self._kept[path]

    # --- training -----------------------------------------------------------------------------------------------------
    def weight(self, job: Job, giver: str, name: str, own: torch.Tensor) -> torch.Tensor | None:
        """Transported weight of a giver by name; zeros for plain shrinking of what it would replace."""
        if giver == "zero":
            return torch.zeros_like(own) if ".self_attn." in name else None
        moved = self.gift(job, f"plans {giver}")["weights"].get(name)
        return None if moved is None else moved.float()

    def batches(self, job: Job) -> Iterator[Lessons]:
        """The given texts, and in a fixed proportion what the writer wrote."""
        arm, size, device = ARMS[job.name], job.setting.batch, self.options.device
        given = self.gift(job, arm.needs()[0])
        if arm.stream is not None:
            given = self.gift(job, f"plans {arm.stream}")["lessons"]
        given = given.pick(self.part(job))
        sources = [(shuffled(given, job.seed) if arm.teacher == "shuffled" else given).to(device)]
        sizes = [size]
        if arm.writer is not None:
            sources.append(self.gift(job, f"written {arm.writer}").to(device))
            sizes = [max(1, round(GIVEN * size))]
            sizes.append(size - sizes[0])
        rounds = [draws(len(source), n, torch.Generator().manual_seed(job.seed)) for source, n in zip(sources, sizes)]
        while True:
            yield joined([source.pick(next(order)) for source, order in zip(sources, rounds)])

    def run(self, job: Job) -> None:
        """Adapt once and write what came out."""
        arm, setting = ARMS[job.name], job.setting
        model = AutoModelForCausalLM.from_pretrained(self.target, dtype=torch.float32).to(self.options.device)
        if arm.merged is not None:
            attach_residuals(model, lambda name, own: self.weight(job, arm.merged, name, own), self.options.alpha)
        curve, best = self.adapt(model, job)
        place = {"task": job.task, "arm": job.name, "seed": job.seed, "rate": setting.rate}
        place |= {"texts": job.texts, "steps": setting.steps, "batch": setting.batch}
        place |= {"share": setting.share} if arm.teacher is not None else {}
        rows = []
        for when, point in (("before", curve[0]), ("after", best), ("last", curve[-1])):
            where = place | {"when": when, "step": point["step"]}
            rows += [
                where | {"metric": name, "value": point[name]} for name in ("valid", "nll") if point[name] is not None
            ]
        self.write(rows)
        told = {point["step"]: round(point["valid"], 4) for point in curve}
        print(place, told, f"held out {best['nll']:.4f}", flush=True)

    def adapt(self, model, job: Job) -> tuple[list[dict], dict]:
        """Train until validation loss has not fallen for `PATIENCE` scorings; every scoring, and the best after step 0."""
        arm, setting, kit, device = ARMS[job.name], job.setting, self.givers(job.task).kit, self.options.device
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=setting.rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True
        )
        ramp = max(1, setting.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / ramp, (setting.steps - step) / max(1, setting.steps - ramp))
        )

        def measure(step: int, least: float | None = None) -> dict:
            """Validation loss; held-out loss too where the former is the best so far."""
            valid = score(model, kit.valid, device)
            better = least is None or valid < least
            return {"step": step, "valid": valid, "nll": score(model, kit.scored, device) if better else None}

        curve, batches = [measure(0)], self.batches(job)
        model.train()
        best, since = None, 0
        for step in range(1, setting.steps + 1):
            batch = next(batches)
            for start in range(0, len(batch), AT_ONCE):
                part = batch.pick(range(start, min(start + AT_ONCE, len(batch))))
                (lesson_loss(model, part, arm, setting.share) * (len(part) / len(batch))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            if step in SCORED_AFTER or step == setting.steps:
                curve.append(measure(step, best["valid"] if best else None))
                since += 1
                if best is None or curve[-1]["valid"] < best["valid"]:
                    best, since = curve[-1], 0
                if since == PATIENCE:
                    break
        return curve, best


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="these arms instead of the plan")
    parser.add_argument("--settings", type=setting, nargs="*", default=[(1e-4, 96, 8)])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.9])
    parser.add_argument("--plan", type=Path, help="JSON list of groups as in PLAN")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--kit", type=Path, default=Path("kit"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resume", type=Path, nargs="*", help="rows of earlier calls: what they hold is not done again"
    )
    parser.add_argument(
        "--late-assets", action="store_true", help="checkpoints are still being copied here: begin without"
    )
    parser.add_argument("--rows", type=Path, default=Path("rows.jsonl"), help="rows are added to this file")
    parser.add_argument("--collect", type=Path, nargs="*", help="write the result file of these rows and stop")
    parser.add_argument("--name", default="merge_adaptation", help="of the result file")
    return parser.parse_args()


def budget(options: argparse.Namespace) -> list[dict]:
    """What every arm is given."""
    numbers = {"alpha": options.alpha, "part of the given texts in a writer's batch": GIVEN}
    numbers |= {"texts written of each": WRITINGS, "tokens written per text": WRITTEN, "temperature": TEMPERATURE}
    rows = [{"metric": f"budget: {name}", "value": value} for name, value in numbers.items()]
    for task in options.tasks:
        kit = load_kit(options.kit / task)
        sizes = {"texts to draw from": len(kit.train), "scored texts": len(kit.scored)}
        sizes["tokens per text"] = sum(len(text.target_ids) for text in kit.train) / len(kit.train)
        taught = {True: 0, False: 0}
        for text in kit.train:
            for inside in taught:
                taught[inside] += len(kit.spelling.taught_rows(text, inside))
        positions = sum(len(text.target_ids) - 1 for text in kit.train)
        sizes |= {
            "taught positions": taught[True] / positions,
            "positions taught where shared": taught[False] / positions,
        }
        rows += [{"metric": f"{task}: {name}", "value": value, "kit": digest(kit)} for name, value in sizes.items()]
    return rows


def main() -> None:
    options = arguments()
    if not options.collect:
        return Bench(options).work()
    lines = [line for path in options.collect for line in path.read_text().splitlines() if line.strip()]
    rows = [json.loads(line) for line in dict.fromkeys(lines)]
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    rows += [*summary(rows), *budget(options)]
    print(write(options.name, rows, "benchmarks.merge.adaptation_claims", command_line(), seeds))


if __name__ == "__main__":
    main()
