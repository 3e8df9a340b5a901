"""What three token types cost in time, alone: `benchmarks/results/token_types_cost.json`.

    python benchmarks/token_types/cost.py --warm              # compiles the kernels, beside whatever else runs
    python benchmarks/token_types/cost.py                     # on a GPU that nothing else uses, a minute
    python benchmarks/token_types/cost.py --device cpu --threads 2 --shapes 135m

The same rows as in `run.py`, for when only the kernels changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import _results
from benchmarks.token_types.methods import OURS


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=None)
    add("--threads", type=int, default=None, help="of the CPU")
    add("--shapes", default="135m,1b,8b", help="sizes of the blocks (default: all three)")
    add("--tokens", default="1,16,2048", help="rows at a time (default 1,16,2048)")
    add("--presets", default=",".join(OURS), help=f"what is timed (default {','.join(OURS)})")
    add("--repeats", type=int, default=600, help="of each measurement, at most (default 600)")
    add("--warm", action="store_true", help="compile the kernels, time nothing")
    add("--out", type=Path, default=_results.RESULTS, metavar="FOLDER", help="where the result is written")
    options = parser.parse_args(arguments)
    import torch

    from benchmarks.token_types.timing import measure

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens, shapes = [int(n) for n in options.tokens.split(",")], options.shapes.split(",")
    head = {"model": "layers", "group": "time", "setting": "w4a4", "seed": 0}
    if options.warm:
        for _ in measure(device, tokens, shapes, options.presets.split(","), 1, 1):
            pass
        return 0
    name = "token_types_cost" if device == "cuda" else "token_types_cost_cpu"
    command = _results.command_line().partition(" --out")[0]
    source = "cost_claims" if device == "cuda" else "no_claims"  # the claim is about a GPU
    rows: list[dict] = []

    def write() -> Path:
        return _results.write(name, rows, f"benchmarks.token_types.{source}", command, [0], folder=options.out)

    for told in measure(device, tokens, shapes, options.presets.split(","), options.repeats):
        rows.append({**head, **told})
        if told["metric"].endswith("_time_ratio"):
            kind = told["metric"].removesuffix("_time_ratio")
            place = f"{told['method']:13s} {told['shape']:5s} {told['tokens']:5d} tokens"
            print(f"{place} {kind:12s} {told['value']:.4f} ± {told['spread']:.4f}", flush=True)
        if told["metric"] == "one_type_time_ratio":  # the last number of a size: what is there by now
            write()
    print(f"Wrote {write().name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
