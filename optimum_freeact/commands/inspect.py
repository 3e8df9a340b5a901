"""`freeact inspect`: what is quantized, what is not and why, how well, and what will run it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from optimum_freeact.commands.folder import check_file, write_json
from optimum_freeact.commands.loading import console, load_config, model_name, pick_device
from optimum_freeact.config_fields import RECORDED
from optimum_freeact.report.inspection import Inspection, inspect_model
from optimum_freeact.report.sizes import human


def run(args: argparse.Namespace) -> None:
    """Inspect and print; with `--json`, write too."""
    check_file(args.json)
    device = pick_device(args.device)
    folder = Path(args.model) if Path(args.model).is_dir() else None
    found = inspect_model(load_config(args.model), folder, device)
    show(console(), model_name(args.model), found, str(device))
    if args.json:
        write_json(Path(args.json), {"model": model_name(args.model), **found.to_dict()})


def show(out: Console, name: str, found: Inspection, device: str) -> None:
    """Print all tables."""
    if found.quantized:
        settings = found.settings
        out.print(f"[bold]{name}[/bold]: quantized by freeact, preset {settings['preset']}", highlight=False)
        hidden = (*RECORDED, "quant_method", "preset")
        pairs = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in hidden)
        out.print(pairs, highlight=False, markup=False)
    else:
        out.print(f"[bold]{name}[/bold]: not quantized; this is what would be", highlight=False)
    out.print(_quantized_table(found))
    out.print(_rest_table(found))
    if found.file_bytes:
        out.print(f"Weight files: {human(found.file_bytes)}", highlight=False)
    if found.record:
        out.print(_record_table(found.record))
    if found.quantized:
        product, reason = found.kernel
        out.print(f"On {device} runs: {product}, because {reason}.", highlight=False, markup=False)
        if found.cache is not None:
            reader, reason = found.cache
            out.print(f"The KV cache is written and read by {reader}: {reason}.", highlight=False, markup=False)


def _quantized_table(found: Inspection) -> Table:
    table = Table(title=f"Quantized, in {found.n_blocks} blocks" if found.quantized else "Linears in the blocks")
    table.add_column("module")
    for heading in ("count", "shape", "stored", "in bf16", "ratio"):
        table.add_column(heading, justify="right")

    def row(name: str, count: int, shape: str, stored: int, bf16: int) -> tuple[str, ...]:
        ratio = f"{stored / bf16:.3f}" if stored and bf16 else "–"
        shown = (human(stored) if found.quantized else "–", human(bf16) if bf16 else "–")
        return name, str(count), shape, *shown, ratio

    for kind in found.kinds:
        table.add_row(*row(kind.name, kind.n_modules, kind.shape, kind.stored_bytes, kind.bf16_bytes))
    table.add_section()
    size = found.size
    table.add_row(*row("all", size.n_linears + size.n_inputs, "", size.stored_bytes, size.bf16_bytes))
    return table


def _rest_table(found: Inspection) -> Table:
    table = Table(title="Not quantized")
    sides: dict[str, JustifyMethod] = {"tensor": "left", "count": "right", "bytes": "right", "why": "left"}
    for heading, side in sides.items():
        table.add_column(heading, justify=side)
    for rest in found.rest:
        table.add_row(rest.name, str(rest.n_tensors), human(rest.n_bytes), rest.why)
    return table


def _record_table(record: dict[str, Any]) -> Table:
    title = f"Calibrated on {record['n_samples']} x {record['seq_len']} tokens in {record['seconds']} s"
    table = Table(title=title, caption="relative error (energy) of each block's output")
    errors = record["output_error"]
    largest = max(errors) or 1.0
    table.add_column("block", justify="right")
    table.add_column("error", justify="right")
    table.add_column("", justify="left")
    for block, error in enumerate(errors):
        table.add_row(str(block), f"{error:.3g}", "█" * max(1, round(30 * error / largest)))
    return table
