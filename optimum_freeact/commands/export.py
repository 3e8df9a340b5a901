"""`freeact export`: a quantized model in, the same model in the compressed-tensors format out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimum_freeact.commands.folder import check_free, new_folder
from optimum_freeact.commands.loading import (
    console,
    copy_processor,
    load_config,
    load_model,
    load_tokenizer,
    quantization_of,
)
from optimum_freeact.hf.compressed_tensors import PACKED, check_expressible, layout, quantization_config, tensors


def run(args: argparse.Namespace) -> None:
    """Load, check that nothing would be lost, write a whole folder."""
    out = Path(args.out)
    check_free(out, args.overwrite, [args.model, args.tokenizer])
    source = load_config(args.model)
    found = quantization_of(source)
    if found is None or found.get("quant_method") != "freeact":
        raise ValueError(f"{args.model!r} is not quantized by freeact; quantize it first.")
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    model = load_model(args.model, "auto", torch.device("cpu"))
    config = model.config.quantization_config
    check_expressible(model, config)
    form = PACKED if args.layout == "packed" else layout(config)
    with new_folder(out) as folder:
        plain = model.config.to_dict()
        plain["quantization_config"] = quantization_config(model, config, form)
        plain["dtype"] = str(model.dtype).removeprefix("torch.")
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        kept = {name: tensor for name, tensor in tensors(model, form).items() if name not in tied}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_processor(args.model, folder)
    console().print(f"[bold]{out}[/bold]: {config.scheme} in the compressed-tensors format", highlight=False)
