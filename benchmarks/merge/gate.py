"""What the confidence gate leaves of alpha for donors that were never trained: `merge.random_donor_gate_alpha`.

    python benchmarks/merge/gate.py --device cuda

Every task of the kit, three random donors of the real donor's shape, all plans. Needs the asset `smollm2` and the kit;
neither mergekit nor POT (confidence compares activations and does not depend on the solver of the neuron plans).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks.merge.kit import TARGET, TASKS, load_kit, plans_of  # noqa: E402
from mergekit_ot.controls import random_donor  # noqa: E402
from mergekit_ot.gate import DEFAULT_MIN_CONFIDENCE  # noqa: E402
from mergekit_ot.settings import PlanSettings  # noqa: E402
from tools.assets import fetch  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


ALPHA = 0.05
SETTINGS = PlanSettings(residual_map="procrustes", solver="entropic", reg=0.05)


def confidences(task: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """One row per block of a random donor."""
    kit = load_kit(options.kit / task)
    with tempfile.TemporaryDirectory() as scratch:
        donor = random_donor(kit.folder / "donor", Path(scratch) / "random", seed=seed)
        bundle, _ = plans_of(kit, fetch(TARGET), donor, options.device, SETTINGS)
    return [
        {"task": task, "seed": seed, "layer": int(layer), "part": part, "metric": "confidence", "value": value}
        for layer, parts in bundle.info["confidence"]["layers"].items()
        for part, value in parts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--kit", type=Path, default=Path("kit"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows = []
    settings = [
        {"metric": "recipe alpha", "value": ALPHA},
        {"metric": "confidence below which the gate closes", "value": DEFAULT_MIN_CONFIDENCE},
    ]
    tasks = [task for task in options.tasks if (options.kit / task / "texts.json").is_file()]
    if not tasks:
        parser.error(f"--kit {options.kit} holds none of {options.tasks}; benchmarks/merge/kit.py writes it")
    for i, seed in enumerate(options.seeds):
        for task in tasks:
            rows += confidences(task, seed, options)
            found = [row["value"] for row in rows if (row["task"], row["seed"]) == (task, seed)]
            print(f"{task}, seed {seed}: largest confidence {max(found):.3f} of {len(found)}", flush=True)
        # after every seed, so that a run that is cut off leaves what it has
        path = write(
            "merge_gate", [*rows, *settings], "benchmarks.merge.gate_claims", command_line(), options.seeds[: i + 1]
        )
    print(path)


if __name__ == "__main__":
    main()
