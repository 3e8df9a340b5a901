"""A fine-tune of SmolLM2-135M, permuted, deepened, rotated or widened, merged back: loss beside plain interpolation.

    python benchmarks/merge/relatives.py --device cuda
    python benchmarks/merge/relatives.py --copies rotated --rows rotated.jsonl    # a part, for one of several processes
    python benchmarks/merge/relatives.py --collect rotated.jsonl ...              # writes the result file of the parts

Needs the assets `smollm2` and `handbook`, not mergekit; POT for an exact plan of the widened copy. The fine-tune is made here (`--steps`), on handbook
text; the gap is |loss(merge) - loss(interpolation)| over the loss that interpolation wins on held-out handbook text.
`merge.relatives.loss_gap_to_interpolation` is the largest gap over copies and alphas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks.merge.texts import padded  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.planning import make_bundle, open_pair  # noqa: E402
from mergekit_ot.relatives import READERS, deepened, permuted, rotated, widened  # noqa: E402
from mergekit_ot.report.evaluate import text_loss  # noqa: E402
from mergekit_ot.settings import Calibration, PlanSettings  # noqa: E402
from mergekit_ot.structure import ATTENTION_NORM, Family, split_name  # noqa: E402
from mergekit_ot.transport import interpolate  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from tools.assets import fetch  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


State = dict[str, torch.Tensor]
ALPHAS = (0.5, 1.0)
COPIES = {
    "permuted": permuted,
    "deepened": deepened,
    "rotated": rotated,
    "permuted and rotated": lambda config, state: permuted(*rotated(config, state)),
    "widened": widened,
}
#: An exact plan between unequal widths needs POT: there, without it, a rotation for the stream and soft neuron plans.
WITHOUT_POT = {"widened": PlanSettings(residual_map="procrustes", solver="entropic", reg=0.02)}
HAS_POT = importlib.util.find_spec("ot") is not None


def folded(name: str, own: State, tuned: State, family: Family) -> torch.Tensor:
    """The fine-tune's weight for the target's norms: what interpolation means when the target keeps its norms."""
    part, _, kind = split_name(name)[1].rpartition(".")
    if kind != "weight" or part not in READERS:
        return tuned[name]
    norm = name.replace(part, ATTENTION_NORM if part.startswith("self_attn") else family.mlp_norm)
    return tuned[name] * (tuned[norm] + family.norm_offset) / (own[norm] + family.norm_offset)


def merged_and_ideal(
    transport: Callable[[str, torch.Tensor], torch.Tensor | None],
    own: State,
    tuned: State,
    family: Family,
    alpha: float,
) -> tuple[State, State]:
    """The target merged with a re-parameterised fine-tune, and with the fine-tune itself."""
    merged, ideal = dict(own), dict(own)
    for name, tensor in own.items():
        transported = transport(name, tensor)
        if transported is not None:
            merged[name] = interpolate(tensor, transported, alpha)
            ideal[name] = interpolate(tensor, folded(name, own, tuned, family), alpha)
    return merged, ideal


def finetune(model, tokenizer, lines: list[str], steps: int, rate: float, device: str):
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        batch = [lines[i] for i in torch.randint(0, len(lines), (8,), generator=draw).tolist()]
        ids, labels = padded(tokenizer(batch, truncation=True, max_length=256)["input_ids"], device)
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels.flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--copies", nargs="*", default=list(COPIES), choices=list(COPIES))
    parser.add_argument("--rows", type=Path, help="write rows here, one JSON object per line, and no result file")
    parser.add_argument("--collect", type=Path, nargs="*", help="write the result file of these rows and stop")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict]:
    """Fine-tune, copy, merge back and score."""
    device, target, rows = options.device, fetch("smollm2"), []
    lines = [line for line in (fetch("handbook") / "text.txt").read_text().splitlines() if len(line) > 200]
    train, held_out = lines[:-300], lines[-300:]
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device).eval()
    own = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def score(state: State) -> float:
        model.load_state_dict(state)
        return text_loss(model.eval(), tokenizer, held_out, max_tokens=options.eval_tokens)[0]

    before = score(own)
    finetune(model, tokenizer, train, options.steps, options.rate, device)
    tuned = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    after = score(tuned)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text("\n".join(train))
        for copy in options.copies:
            start, place = time.perf_counter(), folder / copy.replace(" ", "_")
            config, state = COPIES[copy](model.config, tuned)
            donor = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            donor.load_state_dict(state, strict=False)
            donor.tie_weights()
            donor.save_pretrained(place)
            tokenizer.save_pretrained(place)
            pair = open_pair(str(target), str(place))
            settings = PlanSettings(solver="hard")
            settings = settings if HAS_POT else WITHOUT_POT.get(copy, settings)
            bundle = make_bundle(
                pair, Calibration(str(folder / "text.txt")), settings, folder / "plans", device=device, quiet=True
            )
            readers = CheckpointReader(target), CheckpointReader(place)
            transporter = Transporter(bundle, pair.target, pair.donor, *readers)
            for alpha in ALPHAS:
                states = merged_and_ideal(transporter.transport, own, tuned, pair.target.family, alpha)
                reached, best = (score(state) for state in states)
                values = {
                    "target": before,
                    "fine-tune": after,
                    "merge": reached,
                    "interpolation": best,
                    "gap": abs(reached - best) / max(before - best, 1e-9),
                }
                place = {
                    "donor": copy,
                    "alpha": alpha,
                    "map": bundle.info["residual"]["map"],
                    "solver": settings.solver,
                }
                rows += [place | {"metric": name, "value": value} for name, value in values.items()]
                print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
                if options.rows:
                    options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def main() -> None:
    options = arguments()
    if options.collect:
        rows = [json.loads(line) for path in options.collect for line in path.read_text().splitlines()]
    else:
        rows = measure(options)
    if not options.rows:
        print(write("merge_relatives", rows, "benchmarks.merge.relatives_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
