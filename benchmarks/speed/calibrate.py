"""Closed-form calibration of an 8B shape: seconds of a block, peak memory, and what several GPUs gain.

    python -m benchmarks.speed.calibrate --out DIR
    torchrun --nproc-per-node 2 -m benchmarks.speed.calibrate --out DIR --across

A model of a few blocks of the real shape with random weights; every block costs the same, so that the time of all 32
is that of one times 32 plus what is done once. Rows go to `calibrate.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.speed.llama import plain, shape_config
from optimum_freeact.api import quantize
from optimum_freeact.calibration.ranks import block_bytes
from optimum_freeact.config import FreeActConfig


def main() -> None:
    """Calibrate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--preset", default="freeact-fast")
    parser.add_argument("--across", action="store_true", help="share among the processes of torchrun")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    config = shape_config(args.shape, args.layers)
    config.vocab_size = min(config.vocab_size, 4096)  # the embeddings take no part
    torch.manual_seed(0)
    model = plain(config, "cuda" if has_gpu else "cpu").to("cpu")
    if has_gpu:
        torch.cuda.empty_cache()
    ids = torch.randint(0, config.vocab_size, (args.samples, args.length), generator=torch.Generator().manual_seed(1))
    settings = FreeActConfig(
        preset=args.preset, dataset=ids, n_samples=args.samples, seq_len=args.length, batch_size=args.batch, progress=True,
        across_processes=args.across,
    )  # fmt: skip
    tokens = args.samples * args.length // int(os.environ.get("WORLD_SIZE", 1))
    bound = block_bytes(model.model.layers[0], 2, tokens, config.hidden_size)
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    quantize(model, settings)
    total = time.perf_counter() - start
    blocks = [record.seconds for record in model._freeact_records]
    if int(os.environ.get("RANK", 0)):
        return
    args.out.mkdir(parents=True, exist_ok=True)
    labels = {"what": "calibration", "provider": "freeact", "preset": args.preset, "shape": args.shape, "layers": args.layers,
              "gpus": int(os.environ.get("WORLD_SIZE", 1)), "samples": args.samples, "length": args.length}  # fmt: skip
    later = blocks[1:] or blocks  # the first one compiles and warms up
    rows = [
        {"metric": "block_seconds", "value": statistics.median(later), "spread": (max(later) - min(later)) / 2},
        {"metric": "first_block_seconds", "value": blocks[0]},
        {"metric": "once_seconds", "value": total - sum(blocks)},
        {"metric": "bound_bytes", "value": bound["total"]},
    ]
    if has_gpu:
        rows.append({"metric": "peak_bytes", "value": torch.cuda.max_memory_allocated()})
    with open(args.out / "calibrate.jsonl", "a", encoding="utf-8") as file:
        for row in rows:
            text = json.dumps({**labels, **row})
            print(text, flush=True)
            file.write(text + "\n")


if __name__ == "__main__":
    main()
