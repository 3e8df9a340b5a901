"""Re-parameterised copies of tiny models merged at alpha 1 must give the target back: `merge.exact.*`.

python benchmarks/merge/exactness.py
"""

import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.merge.results import claim, write  # noqa: E402
from mergekit_ot.pipeline import merge_recipe  # noqa: E402
from mergekit_ot.recipe import load_recipe  # noqa: E402
from tests.merge.test_pipeline import COPIES, OPTIONS, distance, logits, pair, write_recipe  # noqa: E402
from tests.merge.tiny import FAMILIES  # noqa: E402


def main() -> None:
    rows = []
    for copy in COPIES:
        for family in FAMILIES:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                model, target, donor = pair(folder, family, copy, tied=family != "qwen2")
                out = merge_recipe(load_recipe(write_recipe(folder, target, donor)), folder / "out", OPTIONS)
                merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
                weights = max(
                    distance(merged.get_parameter(name), parameter) for name, parameter in model.named_parameters()
                )
                for metric, value in (("logits", distance(logits(merged), logits(model))), ("weights", weights)):
                    rows.append(
                        {"family": family, "donor": copy, "metric": f"relative error of {metric}", "value": value}
                    )
            print(family, copy, rows[-1]["value"], rows[-2]["value"], flush=True)
    claims = []
    for copy in COPIES:
        worst = max(row["value"] for row in rows if row["donor"] == copy)
        name = f"merge.exact.{copy.replace(' ', '_')}"
        claims.append(
            claim(name, worst, "<=", 1e-5, "largest relative error over families, of logits and of any weight")
        )
    write("merge_exactness", rows, claims, [0])


if __name__ == "__main__":
    main()
