"""The diffusion model of this benchmark as files: made once, then loaded and scored by every job."""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.token_types import diffusion
from benchmarks.token_types.diffusion import CUTS, MASK_ID, RATIOS


def make(name: str, folder: Path, measure: dict, device: str, seed: int) -> dict:  # noqa: ARG001
    """Adapt the source model and write model, calibration samples and held-out windows; returns what training told.

    Args:
        measure (`dict`): `source` (folder of the autoregressive model), `texts` (name -> file), `train` (arguments of
            [`diffusion.train`]), and the sizes of calibration and scoring.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(measure["source"])  # all that can fail comes before the training
    cuts = measure.get("cuts", CUTS)
    streams, held_out, others = [], [], []
    for text, path in measure["texts"].items():
        streams.append(diffusion.read_stream(tokenizer, path, 0, cuts[text]))
        evaluation = diffusion.read_stream(tokenizer, path, cuts[text], None)
        held_out.append(diffusion.windows_of(evaluation, measure["windows"], measure["window"]))
        others.append(diffusion.windows_beside(evaluation, measure["windows"], measure["window"]))
    source = AutoModelForCausalLM.from_pretrained(measure["source"], dtype=torch.float32)
    mask_id = measure.get("mask_id", MASK_ID)
    model = diffusion.adapt(source, mask_id).to(device)
    told = diffusion.train(model, torch.cat(streams), seed=seed, **measure["train"])
    share = -(-measure["pool"] // len(streams))
    calibration = torch.cat([diffusion.windows_of(s, share, measure["seq_len"]) for s in streams])
    windows = torch.cat(held_out)
    data = {
        "calibration": calibration,
        "windows": windows,
        "validation": torch.cat(others),
        "prompts": windows[:: max(1, len(windows) // 16)][:16, :32],
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    torch.save(data, folder / "data.pt")
    return told


def load(folder: Path, **arguments: Any):
    """The model in float32, quantized on the way if the arguments say so."""
    from transformers import AutoModelForMaskedLM

    import optimum_freeact.models.llada  # noqa: F401

    return AutoModelForMaskedLM.from_pretrained(folder / "model", dtype=torch.float32, **arguments).eval()


@functools.lru_cache(maxsize=1)
def judge(source: str):
    """The autoregressive model that reads what was generated."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def score(model, data: dict, measure: dict, setting: str, folder: str) -> list[dict]:  # noqa: ARG001
    """Masked likelihood and accuracy, all tokens at once and through the cache, and generated text.

    A quantized cache is scored through the cache only; full precision both ways.
    """
    modes = {"whole": 0, "cached": measure["window"] // 2}
    if setting != "w16a16":
        modes = {"cached": modes["cached"]} if "kv" in setting else {"whole": 0}
    rows = []
    for mode, prefix in modes.items():
        for ratio in RATIOS:
            told = diffusion.score_masked(model, data["windows"], ratio, prefix=prefix, batch=measure["score_batch"])
            rows += [
                {"metric": metric, "value": value, "mode": mode, "ratio": ratio} for metric, value in told.items()
            ]
        if measure.get("generate"):
            new, steps = measure["generate"]
            told = diffusion.score_generated(
                model, judge(measure["source"]), data["prompts"], new, steps, mode == "cached"
            )
            rows += [{"metric": metric, "value": value, "mode": mode} for metric, value in told.items()]
    return rows


def validate(model, data: dict, measure: dict, folder: str) -> float:  # noqa: ARG001
    """Masked likelihood on windows that the score does not see."""
    batch = measure["score_batch"]
    return fmean(diffusion.score_masked(model, data["validation"], r, batch=batch)["masked_nll"] for r in RATIOS)
