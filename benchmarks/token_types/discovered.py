"""Discovered types: clusters of token ids as types for centring, against directions carried by the branch.

    python benchmarks/token_types/discovered.py          # SmolLM2, minutes on a CPU; writes token_types_discovered.json

Ids are clustered by their mean normalised inputs over a few blocks (k-means, weighted by how often an id was seen; ids that
were not seen go to the cluster with the nearest embeddings). Rows say how much of the held-out energy about one mean is left
after subtracting K cluster means, after removing K - 1 principal directions, and after both with the branch's 24.

Bytes: K means and biases and the branch's K directions cost the same for each input, K (d + m) numbers. The mean of a
cluster lies in the span of K - 1 differences of means, so on the calibration set the K - 1 strongest directions never leave
more than K cluster means do (Eckart and Young); held-out text says whether that carries over.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tools import result_files


BLOCKS, CLUSTERS, BRANCH = (0, 5, 10, 15, 20, 25), (8, 16, 32), 24
CALIBRATION = {"handbook": (0, 300_000), "brown": (0, 600_000)}
HELD_OUT = {"handbook": (600_000, 900_000), "brown": (4_000_000, 4_300_000)}
INPUTS = {"q+k+v": "self_attn.q_proj", "o": "self_attn.o_proj", "gate+up": "mlp.gate_proj", "down": "mlp.down_proj"}


def claims(rows: list[dict]) -> list[dict]:  # noqa: ARG001
    """What issue 3 asks about discovered types is a finding, not a target: no claims."""
    return []


def inputs_of(model, windows: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Rows that each input reads, without every window's first token (the sink)."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    handles = []
    for index in BLOCKS:
        for name, path in INPUTS.items():

            def hook(module, args, key=(index, name)):  # noqa: ARG001
                seen[key].append(args[0][:, 1:].flatten(0, 1))

            handles.append(model.model.layers[index].get_submodule(path).register_forward_pre_hook(hook))
    with torch.no_grad():
        for part in windows.split(4):
            model.model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def energies(x: torch.Tensor, y: torch.Tensor, kind_x: torch.Tensor, kind_y: torch.Tensor, k: int) -> dict[str, float]:
    """Shares of the energy of held-out `y` about the mean of `x` that are left."""
    x, y = x.double(), y.double()
    u, z = x - x.mean(0), y - x.mean(0)
    count = torch.bincount(kind_x, minlength=k).clamp_min(1)[:, None]
    means = torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, kind_x, u) / count
    directions = torch.linalg.eigh(u.mT @ u)[1].flip(1)
    inner = u - means[kind_x]
    within = torch.linalg.eigh(inner.mT @ inner)[1].flip(1)[:, :BRANCH]
    left = z - means[kind_y]

    def without(v: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return v - v @ basis @ basis.mT

    found = {
        f"{k} cluster means": left,
        f"rank {k - 1}": without(z, directions[:, : k - 1]),
        f"rank {BRANCH}": without(z, directions[:, :BRANCH]),
        f"{k} cluster means and rank {BRANCH}": without(left, within),
        f"rank {BRANCH + k - 1}": without(z, directions[:, : BRANCH + k - 1]),
    }
    return {name: float(v.square().sum() / z.square().sum()) for name, v in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=result_files.RESULTS, metavar="FOLDER", help="where the result is written"
    )
    options = parser.parse_args(arguments)
    # here, so that deriving the claims imports none of it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.token_types.diffusion import read_stream, windows_of
    from optimum_freeact.calibration.discover import cluster_ids
    from tools.assets import fetch

    source = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def windows(ranges: dict, n: int) -> torch.Tensor:
        streams = [read_stream(tokenizer, str(fetch(t) / "text.txt"), *r) for t, r in ranges.items()]
        return torch.cat([windows_of(stream, n, 512) for stream in streams])

    fit, test = windows(CALIBRATION, 20), windows(HELD_OUT, 8)
    x, y = inputs_of(model, fit), inputs_of(model, test)
    ids_x, ids_y = fit[:, 1:].flatten(), test[:, 1:].flatten()
    rows = []
    for k in CLUSTERS:
        chosen = [given for (_, name), given in x.items() if name in ("q+k+v", "gate+up")]
        table = cluster_ids(ids_x, chosen, model.get_input_embeddings().weight.detach(), k)
        for (block, name), given in x.items():
            for method, value in energies(given, y[block, name], table[ids_x], table[ids_y], k).items():
                head = {"model": "smollm2", "input": name, "block": block, "clusters": k, "method": method}
                rows.append({**head, "metric": "energy_left", "value": round(value, 5), "seed": 0})
    path = result_files.write(
        "token_types_discovered",
        rows,
        "benchmarks.token_types.discovered",
        result_files.command_line(),
        [0],
        folder=options.out,
    )
    print(f"Wrote {path.name}: {len(rows)} rows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
