"""Which jobs there are, what claims need first."""

from __future__ import annotations

import argparse

from benchmarks.token_types.jobs import Job
from benchmarks.token_types.methods import (
    CLAIMED,
    CONTROLS,
    DRAWS_NOTHING,
    EARLY,
    FP,
    LEARNED,
    METHODS,
    TIERS,
    group_of,
)
from benchmarks.token_types.sizes import FULL, TINY


def timing(options: argparse.Namespace) -> list[Job]:
    """The time of three types: first a run that compiles the kernels, then one on a GPU that nothing else uses."""
    if options.no_timing:
        return []
    measure = {"tokens": [1, 16, 2048], "shapes": ["135m", "1b", "8b"], "presets": list(TIERS)}
    if options.tiny:
        measure |= {"tokens": [4], "shapes": ["135m"], "repeats": 2, "copies": 2}
    seed = int(options.seeds.split(",")[0])
    common = {"folder": "", "device": options.device, "threads": options.threads}
    real = Job("layers", "freeact-fast", ("w4a4",), seed, {}, measure, **common, group="time")
    if options.device == "cpu":
        return [real]
    warm = Job(
        "layers", "freeact-fast", ("w4a4",), seed, {}, {**measure, "repeats": 1, "copies": 1}, **common, group="warm"
    )
    return [warm, real]


def train_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Where training is cut, by model: `--train-seconds 100`, or `--train-seconds diffusion=100,vlm=150`."""
    given = dict(part.rpartition("=")[::2] for part in (options.train_seconds or "").split(",") if part)
    return {model: float(given.get(model, given.get("", 0))) for model in options.models.split(",") if given}


def plan(options: argparse.Namespace, inputs: dict) -> tuple[list[Job], list[Job]]:
    """Training jobs, and those that need them."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    chosen = options.methods.split(",") if options.methods else None
    training, jobs, seconds = [], [], train_seconds(options)
    for model in options.models.split(","):
        measure = {**(TINY if options.tiny else FULL)[model], **inputs}
        if seconds.get(model):
            measure["train"] = {**measure["train"], "seconds": seconds[model]}
        common = {"model": model, "folder": str(options.work / model), "device": options.device}
        common |= {"threads": options.threads, "measure": measure}
        training.append(Job(method="train", settings=("w16a16",), seed=seeds[0], quantize={}, group="train", **common))
        jobs.append(Job(method=FP[0], settings=(FP[1],), seed=seeds[0], quantize={}, group="full", **common))
        for method, quantize in METHODS.items():
            group = group_of(method)
            if (options.no_ablations and group == "ablation") or (chosen and method not in chosen):
                continue
            if options.epochs and method in LEARNED:
                quantize = {**quantize, "epochs": options.epochs}
            few = group != "method" or method in DRAWS_NOTHING
            for seed in seeds[:1] if few else seeds:  # the cache's means are measured first, then it is left out
                settings = ("w4a4",) if group == "ablation" else ("w4a4kv4", "w4a4")
                told = {"settings": settings, "seed": seed, "quantize": quantize, "group": group, **common}
                if seed != seeds[0] or group == "ablation":  # what is dear to score is scored once
                    told["measure"] = {**measure, "generate": None, "exact": 0, "candidates": 0}
                if seed == seeds[0] and quantize["preset"] in TIERS:  # what a default would be chosen by
                    told["measure"] = {**told.get("measure", measure), "validate": True}
                jobs.append(Job(method=method, **told))
    jobs.sort(key=lambda job: _urgency(job, seeds))
    return training, jobs


REQUIRED = ("flatquant", "freeact-paper", "freeact-fast")  # of what the claims compare, what needs every seed


def _urgency(job: Job, seeds: list[int]) -> tuple:
    """What claims need comes first, the longest of it before the rest; then the table; then further seeds of what claims compare, the
    ablations that explain it, and what is left.
    """
    turn, stage = seeds.index(job.seed), 8
    if job.method == FP[0]:
        stage = 0
    elif job.method in CLAIMED and turn == 0:
        stage = 1
    elif job.method in REQUIRED and turn == 1:
        stage = 2
    elif (job.group == "method" and turn == 0) or (job.method, job.model) == ("flatquant groups", "three_types"):
        stage = 3
    elif job.method in ("flatquant", "freeact-fast"):
        stage = 4
    elif job.method in EARLY and job.method not in LEARNED:
        stage = 5
    elif job.method in CLAIMED:
        stage = 6
    elif job.method in (*CONTROLS, *EARLY):
        stage = 7
    elif job.group == "ablation":
        stage = 9
    return stage, turn, job.method not in LEARNED, EARLY.index(job.method) if job.method in EARLY else 0
