"""Quantize a real chat model to 4-bit weights and activations, save it, reload it and talk to it.

    python examples/quantize_and_chat.py             # SmolLM2-135M-Instruct; fetches it and a text to calibrate on
    python examples/quantize_and_chat.py --quick     # less calibration, a shorter chat
    python examples/quantize_and_chat.py --model FOLDER --text FILE --out FOLDER

It ends in a table: perplexity on text that was not calibrated on, size on disk, seconds.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from optimum_freeact import FreeActConfig, score_text, tokenize_windows  # noqa: E402
from tools.arguments import existing  # noqa: E402
from tools.assets import fetch, fetch_prose  # noqa: E402


PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; everything has a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less calibration and evaluation, one prompt")
    parser.add_argument("--model", type=existing, help="a model's folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--text", type=existing, help="a text file (default: the Debian handbook or the Brown corpus)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quantize_and_chat", help="where to save")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a calibration sample (default %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens an evaluation window (default %(default)s)")
    return parser.parse_args(arguments)


def load(folder: Path, **kwargs) -> torch.nn.Module:
    """A model that computes in float32, which every CPU does fast."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


def chat(model: torch.nn.Module, tokenizer, prompts: tuple[str, ...], max_new_tokens: int) -> list[str]:
    """Greedy answers to single prompts."""
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@torch.no_grad()
def logits(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """What the whole model says of the beginning of a window."""
    return model(windows[:1, :128]).logits


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run everything; returns the table's numbers, row by row."""
    options = read_arguments(arguments)
    console = Console()
    transformers_logging.set_verbosity_error()
    source = options.model or fetch("smollm2")
    text = (options.text or fetch_prose()).read_text(encoding="utf-8")
    cut = len(text) * 3 // 4
    n_samples, n_windows, max_new_tokens = (8, 2, 16) if options.quick else (16, 4, 40)
    prompts = PROMPTS[:1] if options.quick else PROMPTS

    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = tokenize_windows(text[cut:], tokenizer, options.window, n_windows)
    rows: dict[str, dict[str, float]] = {}

    console.rule("Full precision")
    start = time.perf_counter()
    model = load(source)
    score = score_text(model, windows)
    answers = {"full precision": chat(model, tokenizer, prompts, max_new_tokens)}
    rows["full precision"] = {"perplexity": score.perplexity, "nll": score.nll, "bytes": weight_bytes(source)}
    rows["full precision"]["seconds"] = time.perf_counter() - start
    del model
    gc.collect()

    console.rule("Quantize to W4A4, preset freeact, and save")
    start = time.perf_counter()
    config = FreeActConfig(dataset=[text[:cut]], tokenizer=tokenizer, n_samples=n_samples, seq_len=options.seq_len)
    model = load(source, quantization_config=config)
    before = logits(model, windows)
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    model.to(dtype).save_pretrained(options.out)  # what is not quantized returns to the checkpoint's own dtype
    tokenizer.save_pretrained(options.out)
    calibration_seconds = time.perf_counter() - start
    del model
    gc.collect()

    console.rule("Reload and talk")
    start = time.perf_counter()
    model = load(options.out)
    if not torch.equal(logits(model, windows), before):
        raise RuntimeError("The reloaded model computes other logits than the one that was saved.")
    console.print("The reloaded model's logits are those of the saved one, bit by bit.")
    score = score_text(model, windows)
    answers["W4A4"] = chat(model, tokenizer, prompts, max_new_tokens)
    rows["W4A4"] = {"perplexity": score.perplexity, "nll": score.nll, "bytes": weight_bytes(options.out)}
    rows["W4A4"]["seconds"] = time.perf_counter() - start

    for number, prompt in enumerate(prompts):
        console.print(f"\n[bold]{prompt}[/bold]")
        for name, given in answers.items():
            console.print(f"  [cyan]{name}:[/cyan] ", end="")
            console.print(given[number] or "(nothing)", markup=False, highlight=False)
    console.print()
    console.print(table_of(rows, Path(source).name, score.n_tokens, n_samples * options.seq_len))
    console.print(
        f"Quantizing and saving took {calibration_seconds:.0f} s. The folder: {options.out}",
        highlight=False,
        soft_wrap=True,
    )
    return rows


def table_of(rows: dict[str, dict[str, float]], model: str, n_tokens: int, n_calibration: int) -> Table:
    """The last thing printed."""
    table = Table(
        title=model,
        caption=f"perplexity on {n_tokens} tokens, calibrated on {n_calibration} others; seconds: load, score, talk",
    )
    table.add_column("model")
    for heading in ("perplexity", "excess nll", "weights on disk", "seconds"):
        table.add_column(heading, justify="right")
    reference = rows["full precision"]["nll"]
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['nll'] - reference:+.4f}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
