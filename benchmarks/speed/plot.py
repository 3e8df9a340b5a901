"""The roofline of the products on one GPU, from `benchmarks/results/speed.json`.

python -m benchmarks.speed.plot docs/figures/speed_roofline.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks.speed.claims import memory_speed
from tools.result_files import RESULTS, read


# provider: label, bytes of a weight, bytes of an input's number
PROVIDERS = {
    ("linear", "bf16"): ("bf16 linear", 2.0, 2.0),
    ("linear", "freeact-fastest"): ("freeact-fastest, whole linear", 0.5, 2.0),
    ("linear", "freeact-fast"): ("freeact-fast, whole linear", 0.5, 2.0),
    ("kernel", "freeact-fastest product"): ("freeact-fastest, product", 0.5, 1.0),
    ("kernel", "float8 product"): ("FP8 product, exact", 1.0, 1.0),
}


def points(rows: list[dict], what: str, provider: str) -> list[tuple[float, float]]:
    """(operations a byte, operations a second) of each shape and number of tokens."""
    _, of_weight, of_input = PROVIDERS[what, provider]
    found = []
    for row in rows:
        if (row.get("what"), row["provider"]) == (what, provider) and row["value"]:
            n, k, m = row["n"], row["k"], row["m"]
            moved = of_weight * k * m + of_input * n * k + 2 * n * m
            found.append((2 * n * k * m / moved, 2 * n * k * m / (row["value"] * 1e-6)))
    return sorted(found)


def main() -> None:
    """Draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    document = read(RESULTS / "speed.json")
    rows = document["rows"]
    bandwidth = memory_speed(rows)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    peak = max(y for key in PROVIDERS for _, y in points(rows, *key))
    xs = [10 ** (i / 20) for i in range(0, 81)]
    axes.plot(xs, [min(bandwidth * x, peak) / 1e12 for x in xs], color="black", lw=1, label="memory, best product")
    for key, marker in zip(PROVIDERS, "os*D^"):
        found = points(rows, *key)
        axes.scatter([x for x, _ in found], [y / 1e12 for _, y in found], s=22, marker=marker, label=PROVIDERS[key][0])
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="10$^{12}$ operations a second")
    axes.set_ylim(10 ** math.floor(math.log10(bandwidth / 1e12 / 2)), 2 * peak / 1e12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(document["machine"].split(",")[0], fontsize=9)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.target, dpi=130)


if __name__ == "__main__":
    main()
