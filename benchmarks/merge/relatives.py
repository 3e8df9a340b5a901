"""A fine-tune of SmolLM2-135M, permuted, deepened, rotated or widened, merged back: loss beside plain interpolation.

    python benchmarks/merge/relatives.py --device cuda

Needs the assets `smollm2` and `handbook`; neither mergekit nor POT. The fine-tune is made here (`--steps`), on handbook
text; the gap is |loss(merge) - loss(interpolation)| over the loss that interpolation wins on held-out handbook text.
`merge.relatives.loss_gap_to_interpolation` is the largest gap over copies and alphas.
"""

import argparse
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks._results import command_line, write  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.planning import make_bundle, open_pair  # noqa: E402
from mergekit_ot.relatives import READERS, deepened, permuted, rotated, widened  # noqa: E402
from mergekit_ot.report.evaluate import text_loss  # noqa: E402
from mergekit_ot.settings import Calibration, PlanSettings  # noqa: E402
from mergekit_ot.structure import ATTENTION_NORM, split_name  # noqa: E402
from mergekit_ot.transport import interpolate  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from tools.assets import fetch  # noqa: E402


#: Copies and the stream map they call for; `auto` also tries channel maps, whose exact solver needs POT when widths differ.
COPIES = {
    "permuted": (permuted, "auto"),
    "deepened": (deepened, "auto"),
    "rotated": (rotated, "auto"),
    "permuted and rotated": (lambda config, state: permuted(*rotated(config, state)), "auto"),
    "widened": (widened, "procrustes"),
}


def finetune(model, tokenizer, lines: list[str], steps: int, rate: float, device: str):
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        for i in torch.randint(0, len(lines), (8,), generator=draw).tolist():
            ids = tokenizer(lines[i], truncation=True, max_length=256, return_tensors="pt")["input_ids"].to(device)
            (model(input_ids=ids, labels=ids).loss / 8).backward()
        optimiser.step()
    return model.eval()


def folded(name: str, own: dict, tuned: dict, family) -> torch.Tensor:
    """The fine-tune's weight for the target's norms, which the merge keeps."""
    part = split_name(name)[1].removesuffix(".weight")
    if part not in READERS:
        return tuned[name]
    norm = name.replace(part, ATTENTION_NORM if part.startswith("self_attn") else family.mlp_norm)
    return tuned[name] * (tuned[norm] + family.norm_offset) / (own[norm] + family.norm_offset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--copies", nargs="*", default=list(COPIES), choices=list(COPIES))
    options = parser.parse_args()
    device, target, rows = options.device, fetch("smollm2"), []
    lines = [line for line in (fetch("handbook") / "text.txt").read_text().splitlines() if len(line) > 200]
    train, held_out = lines[:-300], lines[-300:]
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device).eval()
    own = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def score(state: dict | None = None) -> float:
        if state is not None:
            model.load_state_dict(state)
        return text_loss(model.eval(), tokenizer, held_out, max_tokens=options.eval_tokens)[0]

    before = score()
    finetune(model, tokenizer, train, options.steps, options.rate, device)
    tuned = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    rows += [
        {"model": "target", "metric": "nll", "value": before},
        {"model": "fine-tune", "metric": "nll", "value": score()},
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text("\n".join(train))
        for copy in options.copies:
            make, residual_map = COPIES[copy]
            config, state = make(model.config, tuned)
            donor = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            donor.load_state_dict(state, strict=False)
            donor.tie_weights()
            place = folder / copy.replace(" ", "_")
            donor.save_pretrained(place)
            tokenizer.save_pretrained(place)
            pair = open_pair(str(target), str(place))
            settings = PlanSettings(
                residual_map=residual_map, solver="hard" if copy != "widened" else "entropic", reg=0.02
            )
            calibration = Calibration(str(folder / "text.txt"))
            bundle = make_bundle(pair, calibration, settings, folder / "plans", device=device, quiet=True)
            transporter = Transporter(
                bundle, pair.target, pair.donor, CheckpointReader(target), CheckpointReader(place)
            )
            for alpha in (0.5, 1.0):
                merged, ideal = dict(own), dict(own)
                for name, tensor in own.items():
                    transported = transporter.transport(name, tensor)
                    if transported is not None:
                        merged[name] = interpolate(tensor, transported, alpha)
                        ideal[name] = interpolate(tensor, folded(name, own, tuned, pair.target.family), alpha)
                reached, best = score(merged), score(ideal)
                gap = abs(reached - best) / max(before - best, 1e-9)
                row = {
                    "donor": copy,
                    "alpha": alpha,
                    "map": bundle.info["residual"]["map"],
                    "merge": reached,
                    "interpolation": best,
                }
                rows.append(row | {"metric": "gap", "value": gap})
                print(rows[-1], flush=True)
    print(write("merge_relatives", rows, "benchmarks.merge.relatives_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
