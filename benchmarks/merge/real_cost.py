"""Time and memory of planning and merging Qwen2.5-Coder-0.5B into SmolLM2-135M on a CPU, and what the gate says.

    OMP_NUM_THREADS=2 python benchmarks/merge/real_cost.py

Needs the assets `smollm2` and `qwen2.5` (tools/assets.py). Code text is taken from the running Python's own library.
`--device cuda` runs models and solvers on a GPU.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.merge.code_text import code_chunks  # noqa: E402
from benchmarks.merge.results import claim, write  # noqa: E402
from mergekit_ot.controls import random_donor  # noqa: E402
from mergekit_ot.gate import DEFAULT_MIN_CONFIDENCE  # noqa: E402
from mergekit_ot.pipeline import merge_recipe, plan_recipe  # noqa: E402
from mergekit_ot.recipe import parse_recipe  # noqa: E402
from tools.assets import fetch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    from mergekit.options import MergeOptions

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "code.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in code_chunks()["calibration"])
        recipe = {
            "merge_method": "transport",
            "base_model": str(fetch("smollm2")),
            "models": [{"model": str(fetch("qwen2.5"))}],
            "parameters": {"alpha": 0.05},
            "calibration": {"dataset": "code.jsonl"},
            "dtype": "bfloat16",
        }
        start = time.perf_counter()
        solved = plan_recipe(parse_recipe(recipe, folder=folder), folder / "plans", device=device)
        planned = time.perf_counter()
        merge_recipe(parse_recipe(recipe, folder=folder), folder / "out", MergeOptions(quiet=True), bundle_of=solved)
        done = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        rows += [
            {"step": "plan", "metric": "minutes", "value": (planned - start) / 60},
            {"step": "merge", "metric": "minutes", "value": (done - planned) / 60},
            {"step": "both", "metric": "processor minutes", "value": time.process_time() / 60},
            {"step": "both", "metric": "peak resident GB", "value": peak},
            {"step": "plan", "metric": "bundle GB", "value": solved[1].bytes() / 1e9},
        ]
        recipe["models"] = [{"model": str(random_donor(fetch("qwen2.5"), folder / "random"))}]
        stranger = plan_recipe(parse_recipe(recipe, folder=folder), folder / "random_plans", device=device)
        for name, bundle in (("real", solved[1]), ("random", stranger[1])):
            for layer, parts in bundle.info["confidence"]["layers"].items():
                for part, value in parts.items():
                    rows.append(
                        {"donor": name, "layer": int(layer), "part": part, "metric": "confidence", "value": value}
                    )
    random = [row["value"] for row in rows if row.get("donor") == "random"]
    alpha = 0.05 * sum(value >= DEFAULT_MIN_CONFIDENCE for value in random) / len(random)
    minutes = sum(row["value"] for row in rows if row["metric"] == "minutes")
    claims = [
        claim("merge.cpu_minutes", minutes, "<=", 10, "plan plus merge, wall clock"),
        claim("merge.cpu_peak_gb", peak, "<=", 6, "peak resident size of the process over plan and merge"),
        claim(
            "merge.random_donor_gate_alpha",
            alpha,
            "<=",
            0.001,
            "mean effective alpha over tensor groups, recipe alpha 0.05",
        ),
    ]
    write("merge_real_cost", rows, claims if device == "cpu" else claims[2:], [0])


if __name__ == "__main__":
    main()
