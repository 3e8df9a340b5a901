"""`freeact evaluate`: perplexity of a model, quantized or not, on a text file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.table import Table

from optimum_freeact.commands.folder import check_file, write_json
from optimum_freeact.commands.loading import (
    console,
    is_masked,
    load_config,
    load_model,
    load_tokenizer,
    load_windows,
    machine,
    model_name,
    pick_device,
    pick_dtype,
    quantization_of,
    score,
)


def run(args: argparse.Namespace) -> None:
    """Score and print; with `--json`, write too."""
    check_file(args.json)
    device = pick_device(args.device)
    config = load_config(args.model)
    windows = load_windows(args.text, load_tokenizer(args.tokenizer or args.model), args.window, args.tokens, config)
    model = load_model(args.model, pick_dtype(args.dtype, device), device)
    start = time.perf_counter()
    result = score(model, windows, "Evaluating", not args.quiet)
    if result.nll != result.nll or result.nll == float("inf"):
        raise ValueError(
            f"The model's nll on {args.text!r} is {result.nll}: its weights or activations are not finite."
        )
    quantization = quantization_of(config) or {}
    found = {
        "model": model_name(args.model),
        "quantization": {k: quantization[k] for k in BRIEF if k in quantization} or None,
        "text": Path(args.text).name,
        "window": args.window,
        "n_tokens": result.n_tokens,
        "of": "hidden tokens" if is_masked(config) else "tokens",
        "nll": result.nll,
        "perplexity": result.perplexity,
        "seconds": round(time.perf_counter() - start, 2),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(),
    }
    table = Table(
        "model", "perplexity", "nll", "tokens", "seconds",
        title=f"{found['text']}, windows of {args.window}", caption=BOUND if is_masked(config) else None,
    )  # fmt: skip
    table.add_row(
        found["model"],
        f"{result.perplexity:.3f}",
        f"{result.nll:.5f}",
        str(result.n_tokens),
        f"{found['seconds']:.1f}",
    )
    console().print(table)
    if args.json:
        write_json(Path(args.json), found)


BOUND = "upper bounds, from hidden tokens (LLaDA, Eq. 6)"
BRIEF = ("quant_method", "preset", "weight_bits", "activation_bits", "kv_bits")
