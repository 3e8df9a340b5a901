"""What three token types cost in time, alone: `benchmarks/results/token_types_cost.json`.

    python benchmarks/token_types/cost.py --warm              # compiles the kernels, beside whatever else runs
    python benchmarks/token_types/cost.py                     # on a GPU that nothing else uses, a minute
    python benchmarks/token_types/cost.py --device cpu --threads 2 --shapes 135m

The same rows as in `run.py`, for when only the kernels changed.

How it is measured, settled before the numbers were seen. Until now each size had two copies of its layers with one type and one
copy with three, run again and again, three times over; and two copies with *one* type differed by up to three parts in a hundred, more
than the claim allows for. That was no noise of the clock but of place: the 1B shape's weights nearly fill the cache, and how much of a
copy stays there from turn to turn hangs on where its tensors happen to lie. A model is not run so: between two turns of a
block come all others. So

- each size has six copies with one type and six with three, made in a random order with gaps between them;
- a round runs each copy once, in an order drawn anew, each between two events of the GPU, as recorded graphs that follow each
  other without a pause; what a copy finds in the cache is what eleven others left there;
- a copy's time is the median of its rounds, a size's ratio the median of the copies with three types over the median of those with
  one; its spread, that of copies drawn anew with putting back;
- the control is the same ratio between halves of the copies with one type, for every way to halve them;
- the claim stays the worst of all sizes and presets that were measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.token_types.methods import TIERS
from benchmarks.token_types.timing import COPIES, ROUNDS, SECONDS, measure
from tools import result_files


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=None)
    add("--threads", type=int, default=None, help="of the CPU")
    add("--shapes", default="135m,1b,8b", help="sizes of the blocks (default: all three)")
    add("--tokens", default="1,16,2048", help="rows at a time (default 1,16,2048)")
    add("--presets", default=",".join(TIERS), help=f"what is timed (default {','.join(TIERS)})")
    add(
        "--repeats",
        type=int,
        default=ROUNDS,
        help=f"rounds, at most (default {ROUNDS}, or what fits into {SECONDS} s)",
    )
    add("--copies", type=int, default=COPIES, help=f"of the layers with one type, and with three (default {COPIES})")
    add("--warm", action="store_true", help="compile the kernels, time nothing")
    add("--out", type=Path, default=result_files.RESULTS, metavar="FOLDER", help="where the result is written")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens, shapes = [int(n) for n in options.tokens.split(",")], options.shapes.split(",")
    head = {"model": "layers", "group": "time", "setting": "w4a4", "seed": 0}
    if options.warm:
        for _ in measure(device, tokens, shapes, options.presets.split(","), 1, 2):  # halves need two
            pass
        return 0
    name = "token_types_cost" if device == "cuda" else "token_types_cost_cpu"
    command = result_files.without_places(result_files.command_line())
    source = "cost_claims" if device == "cuda" else "no_claims"  # the claim is about a GPU
    rows: list[dict] = []
    begun = time.perf_counter()

    def write() -> Path:
        return result_files.write(name, rows, f"benchmarks.token_types.{source}", command, [0], folder=options.out)

    for told in measure(device, tokens, shapes, options.presets.split(","), options.repeats, options.copies):
        rows.append({**head, **told})
        if told["metric"].endswith("_ratio"):
            kind = told["metric"].removesuffix("_ratio").removesuffix("_time")
            place = f"{told['method']:15s} {told['shape']:5s} {told['tokens']:5d} tokens"
            noise = f" ± {told['spread']:.4f}" if "spread" in told else ""
            print(f"{time.perf_counter() - begun:4.0f} s {place} {kind:14s} {told['value']:.4f}{noise}", flush=True)
        if told["metric"] == "one_type_time_ratio":  # the last number of a size: what is there by now
            write()
    print(f"Wrote {write().name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
