"""Re-parameterised copies of tiny models merged at alpha 1 must give the target back: `merge.exact.*`.

python benchmarks/merge/exactness.py
"""

import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mergekit_ot.pipeline import merge_recipe  # noqa: E402
from mergekit_ot.recipe import load_recipe  # noqa: E402
from tests.merge.test_pipeline import COPIES, OPTIONS, distance, logits, pair, write_recipe  # noqa: E402
from tests.merge.tiny import FAMILIES  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


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
    rows += [row for preset in ("structured", "paper", "paper-released") for row in arithmetic(preset)]
    print(write("merge_exactness", rows, "benchmarks.merge.exactness_claims", command_line(), [0]))


def arithmetic(preset: str) -> list[dict]:
    """Size of the transported weights and distance of the merge from plain shrinking, alpha 0.3, permuted copy."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, target, donor = pair(folder, "llama", "permuted")
        recipe = load_recipe(write_recipe(folder, target, donor, preset=preset, alpha=0.3))
        plans = folder / "plans"
        out = merge_recipe(recipe, folder / "out", OPTIONS, plans=plans)
        shrunk = merge_recipe(recipe, folder / "shrunk", OPTIONS, plans=plans, control="shrink")
        tensors = json.loads((out / "transport.json").read_text())["tensors"].values()
        ratios = sorted(record["norm_ratio"] for record in tensors)
        found, shrunk = (logits(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)) for f in (out, shrunk))
        row = {"family": "llama", "donor": "permuted", "preset": preset}
        return [
            row | {"metric": "median of norm(W') / norm(W)", "value": ratios[len(ratios) // 2]},
            row | {"metric": "distance of the logits from shrinking alone", "value": distance(found, shrunk)},
            row | {"metric": "distance of the logits from the target", "value": distance(found, logits(model))},
        ]


if __name__ == "__main__":
    main()
