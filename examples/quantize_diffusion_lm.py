"""Quantize a masked-diffusion language model to 4-bit weights, activations and KV cache, and let it write.

    python examples/quantize_diffusion_lm.py                          # adapts SmolLM2 first: minutes on a GPU, roughly on a CPU
    python examples/quantize_diffusion_lm.py --model FOLDER --text FILE      # LLaDA or Dream, or one made before

The mask token is a token type of its own, found in the model's config. The script ends in a table and a page about the types.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import optimum_freeact.models.dream  # noqa: E402, F401
import optimum_freeact.models.llada  # noqa: E402, F401
from benchmarks.token_types import diffusion  # noqa: E402
from optimum_freeact import FreeActConfig  # noqa: E402
from optimum_freeact.calibration.masking import mask_samples  # noqa: E402
from optimum_freeact.models.denoise import denoise  # noqa: E402
from optimum_freeact.report.type_report import measure_types, write_report  # noqa: E402
from tools.arguments import existing  # noqa: E402
from tools.assets import fetch, fetch_prose  # noqa: E402


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; everything has a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=existing, help="a masked-diffusion model's folder (default: adapt one)")
    parser.add_argument(
        "--source", type=existing, help="the autoregressive model to adapt (default: SmolLM2, fetched)"
    )
    parser.add_argument("--text", type=existing, help="a text file (default: the Debian handbook or the Brown corpus)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quantize_diffusion_lm", help="where to save")
    parser.add_argument("--train-seconds", type=float, default=240.0, help="of adapting (default %(default)s)")
    parser.add_argument("--mask-id", type=int, default=diffusion.MASK_ID, help="id of [MASK] when adapting")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a sample and window (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to write (default %(default)s)")
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace, device: str, stream: torch.Tensor) -> Path:
    """Adapt the autoregressive source and save it; returns the folder."""
    folder = options.out / "full"
    source = AutoModelForCausalLM.from_pretrained(options.source or fetch("smollm2"), dtype=torch.float32)
    model = diffusion.adapt(source, options.mask_id).to(device)
    batch = 64 if device == "cuda" else 4
    length = min(512 if device == "cuda" else 128, len(stream))
    diffusion.train(model, stream, steps=2000, batch=batch, length=length, seconds=options.train_seconds)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tokenizer_folder(options: argparse.Namespace) -> Path:
    """Where the tokenizer is: beside the model, or, for one that was adapted before, beside what it was adapted from."""
    for folder in (options.model, options.source):
        if folder and any(folder.glob("tokenizer*")):
            return folder
    return fetch("smollm2")


def scores(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """Masked negative log-likelihood at three mask ratios."""
    return {
        f"{r:.0%} masked": diffusion.score_masked(model, windows, r, batch=4)["masked_nll"] for r in diffusion.RATIOS
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run everything; returns the table's numbers, row by row."""
    options = read_arguments(arguments)
    console = Console()
    transformers_logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(options))
    text = (options.text or fetch_prose()).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    stream, held_out = ids[: len(ids) * 3 // 4], ids[len(ids) * 3 // 4 :]

    console.rule("Full precision")
    folder = options.model or make_model(options, device, stream)
    windows = diffusion.windows_of(held_out, 4, options.seq_len)
    samples = diffusion.windows_of(stream, options.samples, options.seq_len)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    prompt = windows[:1, :16].to(device)
    rows = {"full precision": scores(model, windows)}
    written = {"full precision": denoise(model, prompt, options.new_tokens, options.new_tokens // 2)}
    config = FreeActConfig(kv_bits=4, dataset=samples, n_samples=options.samples, seq_len=options.seq_len)
    masked = mask_samples(samples, model.config.mask_token_id, seed=0)
    types = measure_types(model, masked, config)
    del model
    gc.collect()

    console.rule("Quantize to W4A4KV4, save, reload")
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    records = model.__dict__["_freeact_records"]
    console.print(f"Token types: {', '.join(model.hf_quantizer.quantization_config.token_types)}")
    model.save_pretrained(options.out / "w4a4kv4")
    tokenizer.save_pretrained(options.out / "w4a4kv4")
    model = AutoModelForMaskedLM.from_pretrained(options.out / "w4a4kv4", dtype=torch.float32).eval().to(device)
    rows["W4A4KV4"] = scores(model, windows)
    written["W4A4KV4"] = denoise(
        model, prompt, options.new_tokens, options.new_tokens // 2, block=options.new_tokens // 2, use_cache=True
    )
    page = write_report(types, options.out / "page", Path(options.model or options.source or "smollm2").name, records)

    console.print(f"\n[bold]{tokenizer.decode(prompt[0])}[/bold] ...", highlight=False)
    for name, made in written.items():
        console.print(f"  [cyan]{name}:[/cyan] ", end="")
        console.print(tokenizer.decode(made[0, prompt.shape[1] :]).strip(), markup=False, highlight=False)
    table = Table(title="masked negative log-likelihood, nats", caption=f"{windows.numel()} held-out tokens")
    for heading in ("model", *rows["W4A4KV4"]):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    console.print(f"The page about the types: {page}", highlight=False, soft_wrap=True)
    return rows


if __name__ == "__main__":
    main()
