"""`freeact compare`: presets and schemes side by side on one model, as a table, JSON, Markdown and a figure."""

from __future__ import annotations

import argparse
import gc
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm

from optimum_freeact.api import quantize
from optimum_freeact.commands.folder import check_free, new_folder
from optimum_freeact.commands.loading import (
    check_full_precision,
    console,
    is_masked,
    load_calibration,
    load_config,
    load_model,
    load_tokenizer,
    load_windows,
    machine,
    model_name,
    pick_device,
    pick_dtype,
    score,
)
from optimum_freeact.commands.options import given_settings
from optimum_freeact.config import FreeActConfig
from optimum_freeact.report import plots
from optimum_freeact.report.report import FULL_PRECISION, HEADINGS, Comparison, Row, cells, measured, write_files
from optimum_freeact.report.sizes import quantized_size


SCHEME = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?", re.IGNORECASE)
COMMON = ("n_samples", "seq_len", "seed", "batch_size")  # calibration settings shared by all rows


def parse_scheme(text: str) -> dict[str, int]:
    """Bits of a scheme such as `W4A4KV4`; without `KV` the cache keeps 16.

    Raises:
        `ValueError`: for anything else.
    """
    match = SCHEME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--schemes must be like W4A16,W4A4,W4A4KV4, got {text!r}.")
    weight, activation, cache = match.groups()
    return {"weight_bits": int(weight), "activation_bits": int(activation), "kv_bits": int(cache or 16)}


def plan(args: argparse.Namespace) -> list[FreeActConfig]:
    """One config per scheme and preset, all checked before anything runs.

    Raises:
        `ValueError`: for an unknown preset or scheme, or none.
    """
    schemes = [parse_scheme(text) for text in args.schemes.split(",") if text.strip()]
    presets = [name.strip() for name in args.presets.split(",") if name.strip()]
    if not schemes or not presets:
        raise ValueError(f"Name at least one preset and one scheme, got {args.presets!r} and {args.schemes!r}.")
    common = given_settings(args)
    return [FreeActConfig(**{**common, **bits, "preset": name}) for bits in schemes for name in presets]


def run(args: argparse.Namespace) -> int:
    """Measure everything, print the table, write the files; 1 if a preset failed where others did not."""
    configs = plan(args)
    out = Path(args.out)
    check_free(out, args.overwrite, [args.model, args.dataset, args.text, args.resume_dir, args.tokenizer])
    device = pick_device(args.device)
    source = load_config(args.model)
    check_full_precision(args.model, source)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    vocab_size = source.get_text_config(decoder=True).vocab_size
    windows = load_windows(args.text, tokenizer, args.window, args.tokens, source)
    samples = load_calibration(args.dataset, tokenizer, configs[0], vocab_size, args.model)
    if os.path.isfile(args.dataset) and os.path.samefile(args.dataset, args.text):
        console().print("The presets are calibrated and evaluated on the same file: scores flatter.", style="yellow")
    dtype = pick_dtype(args.dtype, device)
    with new_folder(out) as folder:
        rows = measure(args, configs, samples, windows, device, dtype)
        comparison = Comparison(
            model=model_name(args.model),
            dataset=Path(args.dataset).name if os.path.isfile(args.dataset) else args.dataset,
            text=Path(args.text).name,
            n_tokens=windows[:, 1:].numel(),
            window=args.window,
            settings={name: getattr(configs[0], name) for name in COMMON},
            machine=machine(),
            rows=rows,
            masked=is_masked(source),
        )
        console().print(table_of(comparison))
        if all(row.nll is None for row in rows[1:]):
            raise ValueError(f"No preset could be measured; the first says: {rows[1].note}")
        written = write_files(comparison, folder)
        if plots.available():
            plots.plot_comparison(folder / "comparison.json", folder / "comparison.png")
            written.append("comparison.png")
    note = "" if "comparison.png" in written else " (no figure: pip install 'hf-concord[plots]')"
    console().print(f"Written to {out}: {', '.join(written)}{note}", highlight=False, markup=False, soft_wrap=True)
    return int(any(row.nll is None for row in rows))


def measure(
    args: argparse.Namespace,
    configs: list[FreeActConfig],
    samples: torch.Tensor,
    windows: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | str,
) -> list[Row]:
    """Rows of the full-precision model and of every config; one model is in memory at a time."""
    progress = not args.quiet
    model = load_model(args.model, dtype, device)
    start = time.perf_counter()
    reference = score(model, windows, FULL_PRECISION, progress).nll
    bits = str(model.dtype).removeprefix("torch.")
    seconds = time.perf_counter() - start
    rows = [measured(FULL_PRECISION, bits, reference, reference, evaluation_seconds=round(seconds, 2))]
    if rows[0].nll is None:
        raise ValueError(f"The full-precision model cannot be scored: {rows[0].note}.")
    del model
    for config in tqdm(configs, desc="Comparing", unit="preset", disable=not progress):
        gc.collect()
        config.dataset, config.calibration_device, config.progress = samples, str(device), progress
        if args.resume_dir:
            config.resume_dir = os.path.join(args.resume_dir, f"{config.preset}-{config.scheme}")
        try:
            rows.append(_measure_one(args.model, config, windows, device, dtype, reference, progress))
        except ValueError as error:  # this preset cannot do it: the others may
            rows.append(Row(config.preset, config.scheme, note=" ".join(str(error).split())))
    return rows


def _measure_one(
    name: str,
    config: FreeActConfig,
    windows: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | str,
    reference: float,
    progress: bool,
) -> Row:
    model = quantize(load_model(name, dtype, torch.device("cpu")), config).to(device)
    record: dict[str, Any] = model.config.quantization_config.calibration_record
    start = time.perf_counter()
    nll = score(model, windows, f"{config.preset} {config.scheme}", progress).nll
    return measured(
        config.preset,
        config.scheme,
        nll,
        reference,
        size_ratio=quantized_size(model).ratio,
        calibration_seconds=record["seconds"],
        evaluation_seconds=round(time.perf_counter() - start, 2),
        output_error=record["output_error"],
    )


def table_of(comparison: Comparison) -> Table:
    """The table for the terminal."""
    facts = comparison.facts()
    table = Table(title=f"{comparison.model}: {facts['evaluated on']}", caption=f"{facts['calibrated on']}")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    scheme = None
    for row in comparison.rows:
        if row.scheme != scheme and scheme is not None:
            table.add_section()
        scheme = row.scheme
        table.add_row(*cells(row))
        if row.note:
            table.add_row("", row.note[:80], *[""] * (len(HEADINGS) - 2))
    return table
