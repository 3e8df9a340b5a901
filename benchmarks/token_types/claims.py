"""The claims of `benchmarks/results/token_types.json`, from its rows alone."""

from __future__ import annotations

from statistics import fmean, pstdev

from tools.result_files import claim


MODELS = ("diffusion", "vlm", "three_types")
OURS = "freeact-fast"  # with one grid per weight row and token, as all published methods have
LOSS = {"diffusion": "masked_nll", "vlm": "caption_nll", "three_types": "masked_nll"}


def losses(rows: list[dict], model: str, method: str, setting: str) -> dict[int, float]:
    """Mean loss of a method by seed (over mask ratios where there are several); empty where any was not measured.

    A setting with a quantized cache is scored through a cache, and so is its full precision.
    """
    mode = "cached" if "kv" in setting else "whole"
    chosen = [
        row
        for row in rows
        if row["metric"] == LOSS[model]
        and (row["model"], row["method"], row.get("mode")) == (model, method, mode)
        and (method == "fp" or row["setting"] == setting)
    ]
    if any(row["value"] is None for row in chosen):
        chosen = [row for row in chosen if row["seed"] not in {r["seed"] for r in chosen if r["value"] is None}]
    seeds = sorted({row["seed"] for row in chosen})
    return {seed: fmean(row["value"] for row in chosen if row["seed"] == seed) for seed in seeds}


def won_back(rows: list[dict], model: str, method: str, setting: str, over: str = "flatquant") -> float | None:
    """Share of FlatQuant's loss over full precision that a method does not lose; means over seeds."""
    full, flat, ours = (losses(rows, model, name, setting) for name in ("fp", over, method))
    if not (full and flat and ours):
        return None
    base = fmean(full.values())
    lost = fmean(flat.values()) - base
    return 1 - (fmean(ours.values()) - base) / lost if lost > 0 else None


def claims(rows: list[dict]) -> list[dict]:
    """What could be measured of what issue 3 asks for."""
    made = []
    for model in MODELS:
        for setting in ("w4a4", "w4a4kv4"):
            for ours, over, name in (
                (OURS, "flatquant", "gap_won_back_over_flatquant"),
                ("freeact", "flatquant groups", "groups.gap_won_back_over_flatquant"),
            ):
                share = won_back(rows, model, ours, setting, over)
                if share is not None:
                    spread = pstdev(losses(rows, model, ours, setting).values())
                    how = (
                        f"1 - (loss[{ours}] - loss[fp]) / (loss[{over}] - loss[fp]), loss = {LOSS[model]}, means over "
                        f"seeds; spread of {ours}'s loss {spread:.4f}"
                    )
                    made.append(claim(f"token_types.{model}.{setting}.{name}", share, ">=", 0.60, how))
        ours, paper = (won_back(rows, model, name, "w4a4") for name in (OURS, "freeact-paper"))
        if ours is not None and paper is not None:
            how = f"gap won back over flatquant by {OURS}, less that by freeact-paper"
            made.append(claim(f"token_types.{model}.w4a4.ours_minus_freeact_paper", ours - paper, ">", 0.0, how))
    shares = [
        r["value"]
        for r in rows
        if r["metric"] == "per_type_parameter_share" and r["method"] in (OURS, "freeact") and r["value"] is not None
    ]
    if shares:
        how = "bytes that further types add over bytes of the whole saved model, the worst of the models"
        made.append(claim("token_types.per_type_parameter_share", max(shares), "<=", 0.01, how))
    return made
