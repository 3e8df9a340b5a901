"""`freeact quantize`: a full-precision model in, a folder with the quantized model, its tokenizer and a card out."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import nn

from optimum_freeact.api import quantize
from optimum_freeact.commands.folder import check_free, new_folder
from optimum_freeact.commands.loading import (
    check_full_precision,
    console,
    copy_processor,
    is_masked,
    load_calibration,
    load_config,
    load_model,
    load_tokenizer,
    model_name,
    pick_device,
    pick_dtype,
)
from optimum_freeact.commands.options import given_settings
from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.auto import auto_class
from optimum_freeact.models.loaders import loader_of
from optimum_freeact.report.model_card import model_card
from optimum_freeact.report.sizes import human, quantized_size


def run(args: argparse.Namespace) -> None:
    """Check everything that can be known early, calibrate, save."""
    config = FreeActConfig(**given_settings(args) | {"preset": args.preset})
    out = Path(args.out)
    check_free(out, args.overwrite, [args.model, args.dataset, args.resume_dir, args.tokenizer])
    device = pick_device(args.device)
    source = load_config(args.model)
    check_full_precision(args.model, source)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    vocab_size = source.get_text_config(decoder=True).vocab_size
    config.dataset = load_calibration(args.dataset, tokenizer, config, vocab_size, args.model)
    config.tokenizer, config.resume_dir = tokenizer, args.resume_dir
    config.calibration_device, config.progress = str(device), not args.quiet
    start = time.perf_counter()
    with new_folder(out) as folder:
        # weights that stay in 16 bits are stored in the dtype they are calibrated in
        dtype = "auto" if args.dtype is None and config.weight_bits == 16 else pick_dtype(args.dtype, device)
        model = quantize(load_model(args.model, dtype, torch.device("cpu")), config)
        save(model, folder, getattr(source, "dtype", None))
        tokenizer.save_pretrained(folder)
        copy_processor(args.model, folder)
        size = quantized_size(model)
        card = model_card(
            base=model_name(args.model),
            on_hub=not os.path.isdir(args.model) and "/" in args.model,
            folder=out.name,
            dataset=model_name(args.dataset) if not os.path.isfile(args.dataset) else Path(args.dataset).name,
            config=model.config.quantization_config,
            size=size,
            chat=bool(getattr(tokenizer, "chat_template", None)),
            auto="AutoModelForMaskedLM" if is_masked(source) else auto_class(source).__name__,
            loader=loader_of(source.model_type),
            masked=is_masked(source),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    errors = model.config.quantization_config.calibration_record["output_error"]
    console().print(
        f"[bold]{out}[/bold]: {config.scheme}, preset {config.preset}, {human(total)} on disk; {size.n_linears} linears "
        f"in {human(size.stored_bytes)} ({size.ratio:.3f} of bfloat16); output error of the last block {errors[-1]:.3g}; "
        f"{time.perf_counter() - start:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def save(model: nn.Module, folder: Path, dtype: torch.dtype | str | None) -> None:
    """Save a quantized model; what is not quantized returns to the checkpoint's own dtype, without loss.

    Quantized modules keep their dtypes in any case.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype != model.dtype:
        model.to(dtype)
    type(model).save_pretrained(model, folder)  # the folder is new and hidden still: no need to be careful twice
