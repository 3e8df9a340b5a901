"""The vision-language models of this benchmark as files: made once, then loaded and scored by every job."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.token_types import vision
from benchmarks.token_types.diffusion import MASK_ID, RATIOS
from benchmarks.token_types.scenes import Scenes


IMAGE_ID = 15  # of SmolLM2: "<jupyter_script>", reserved and absent from captions


def scenes_of(measure: dict) -> Scenes:
    """The world of scenes that the measure describes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(measure["source"])
    ids = measure.get("ids", {"image_id": IMAGE_ID, "start_id": 1, "end_id": 2})
    return Scenes(measure["pictures"], tokenizer, **ids, n_names=measure["names"])


def make(name: str, folder: Path, measure: dict, device: str, seed: int) -> dict:
    """Assemble and train a model and write it with calibration inputs and held-out scenes."""
    from transformers import AutoModelForCausalLM

    scenes = scenes_of(measure)
    source = AutoModelForCausalLM.from_pretrained(measure["source"], dtype=torch.float32)
    mask_id = measure.get("mask_id", MASK_ID) if name == "three_types" else None
    model = vision.assemble(source, scenes.image_id, mask_id, measure.get("sight", vision.SIGHT)).to(device)
    told = vision.train(model, scenes, seed=seed, **measure["train"])
    generator = torch.Generator().manual_seed(seed + 1)
    calibration = []
    for i in range(measure["pool"]):
        inputs = scenes.inputs(scenes.draw(measure["per_input"], generator))
        if mask_id is not None:
            ratio = torch.full((measure["per_input"],), (i + 0.5) / measure["pool"])
            inputs, _ = vision.mask_captions(model, inputs, ratio, generator)
        calibration.append(inputs)
    data = {"calibration": calibration, "cells": scenes.draw(measure["scenes"], generator, at_least=2)}
    data["validation"] = scenes.draw(measure["scenes"], generator, at_least=2)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    torch.save(data, folder / "data.pt")
    (folder / "kind.json").write_text(json.dumps({"model": name}))
    return told


def load(folder: Path, **arguments: Any):
    """The model in float32, quantized on the way if the arguments say so."""
    from transformers import LlavaForConditionalGeneration

    import optimum_freeact.models.llada  # noqa: F401

    return LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32, **arguments).eval()


def score(model, data: dict, measure: dict, setting: str, folder: str) -> list[dict]:
    """Likelihood, exact match and retrieval of captions; of masked captions where the model denoises.

    A quantized cache is scored through the cache only; full precision both ways.
    """
    name = json.loads((Path(folder) / "kind.json").read_text())["model"]
    scenes, cells, batch = scenes_of(measure), data["cells"], measure["score_batch"]
    modes = {"whole": False, "cached": True}
    if setting != "w16a16":
        modes = {"cached": True} if "kv" in setting else {"whole": False}
    rows = []
    for mode, use_cache in modes.items():
        scores: list[tuple[dict, dict]] = []
        if name == "three_types":
            for ratio in RATIOS:
                scores.append((vision.score_masked(model, scenes, cells, ratio, batch, use_cache), {"ratio": ratio}))
        else:
            scores.append((vision.score_captions(model, scenes, cells, batch, use_cache), {}))
        if measure["exact"]:
            few = cells[: measure["exact"]]
            scores.append((vision.score_written(model, scenes, few, batch, use_cache), {}))
        if measure["candidates"]:
            few = cells[: measure["exact"]]
            scores.append((vision.score_retrieval(model, scenes, few, measure["candidates"], batch, use_cache), {}))
        for told, more in scores:
            rows += [{"metric": metric, "value": value, "mode": mode, **more} for metric, value in told.items()]
    return rows


def validate(model, data: dict, measure: dict, folder: str) -> float:
    """Likelihood of captions (of masked ones where the model denoises) of scenes that the score does not see."""
    scenes, cells, batch = scenes_of(measure), data["validation"], measure["score_batch"]
    if json.loads((Path(folder) / "kind.json").read_text())["model"] != "three_types":
        return vision.score_captions(model, scenes, cells, batch, False)["caption_nll"]
    return fmean(vision.score_masked(model, scenes, cells, r, batch, False)["masked_nll"] for r in RATIOS)
