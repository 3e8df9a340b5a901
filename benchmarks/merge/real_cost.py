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

from benchmarks.merge.texts import code_chunks  # noqa: E402
from mergekit_ot.pipeline import merge_recipe, plan_recipe  # noqa: E402
from mergekit_ot.recipe import parse_recipe  # noqa: E402
from tools.assets import fetch  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


ALPHA = 0.05


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
            "parameters": {"alpha": ALPHA},
            "calibration": {"dataset": "code.jsonl"},
            "dtype": "bfloat16",
        }
        start = time.perf_counter()
        solved = plan_recipe(parse_recipe(recipe, folder=folder), folder / "plans", device=device)
        planned = time.perf_counter()
        merge_recipe(parse_recipe(recipe, folder=folder), folder / "out", MergeOptions(quiet=True), bundle_of=solved)
        done = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        costs = [
            {"step": "plan", "metric": "minutes", "value": (planned - start) / 60},
            {"step": "merge", "metric": "minutes", "value": (done - planned) / 60},
            {"step": "both", "metric": "processor minutes", "value": time.process_time() / 60},
            {"step": "both", "metric": "peak resident GB", "value": peak},
            {"step": "plan", "metric": "bundle GB", "value": solved[1].bytes() / 1e9},
        ]
        rows += [{"device": device, **row} for row in costs]
        for layer, parts in solved[1].info["confidence"]["layers"].items():
            for part, value in parts.items():
                rows.append({"layer": int(layer), "part": part, "metric": "confidence", "value": value})
    print(write("merge_real_cost", rows, "benchmarks.merge.real_cost_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
