"""Quantize a vision-language model to 4-bit weights, activations and KV cache; its image tokens are a type of their own.

    python examples/quantize_vlm.py                        # puts a small one together first: minutes on a GPU, roughly on a CPU
    python examples/quantize_vlm.py --model FOLDER         # one that this script or the benchmark made before

Calibration takes what a processor gives: a list of dictionaries with input_ids, attention_mask and pixel_values. The same
goes for Qwen-VL, LLaVA, InternVL, SmolVLM, Gemma 3 and others of transformers. The script ends in captions and a table.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.token_types import vision  # noqa: E402
from benchmarks.token_types.scenes import HEAD, Scenes  # noqa: E402
from benchmarks.token_types.vision_world import IMAGE_ID  # noqa: E402
from optimum_freeact import FreeActConfig  # noqa: E402
from optimum_freeact.report.type_report import measure_types, write_report  # noqa: E402
from tools.arguments import existing  # noqa: E402
from tools.assets import fetch  # noqa: E402


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; everything has a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=existing, help="a model's folder (default: make one)")
    parser.add_argument("--source", type=existing, help="the language model to start from (default: SmolLM2, fetched)")
    parser.add_argument("--pictures", type=existing, help="the pictures (default: fetched)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quantize_vlm", help="where to save")
    parser.add_argument("--train-seconds", type=float, default=240.0, help="of making it (default %(default)s)")
    parser.add_argument("--image-id", type=int, default=IMAGE_ID, help="id of an image's placeholder")
    parser.add_argument("--names", type=int, default=64, help="how many things there are (default %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="calibration batches of four (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a smaller vision part")
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace, device: str, scenes: Scenes) -> Path:
    """Put a model together, train it and save it; returns the folder."""
    source = AutoModelForCausalLM.from_pretrained(options.source or fetch("smollm2"), dtype=torch.float32)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = vision.assemble(source, options.image_id, None, small if options.small else vision.SIGHT).to(device)
    vision.train(model, scenes, steps=2000, batch=96 if device == "cuda" else 8, seconds=options.train_seconds)
    model.to(torch.bfloat16).save_pretrained(options.out / "full")
    return options.out / "full"


@torch.no_grad()
def captions(model: torch.nn.Module, tokenizer, scenes: Scenes, cells: torch.Tensor) -> list[str]:
    """Greedy captions of scenes."""
    inputs = vision.on(scenes.inputs(cells, [[] for _ in cells]), next(model.parameters()).device)
    made = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=scenes.end_id, pad_token_id=scenes.end_id
    )
    return tokenizer.batch_decode(made[:, HEAD:], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run everything; returns the table's numbers, row by row."""
    options = read_arguments(arguments)
    console = Console()
    transformers_logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = options.source or fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(where)
    scenes = Scenes(str(options.pictures or fetch("pictures")), tokenizer, options.image_id, 1, 2, options.names)
    generator = torch.Generator().manual_seed(1)
    calibration = [scenes.inputs(scenes.draw(4, generator)) for _ in range(options.samples)]
    cells = scenes.draw(32, generator, at_least=2)

    console.rule("Full precision")
    folder = options.model or make_model(options, device, scenes)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    rows = {"full precision": vision.score_captions(model, scenes, cells, 8, True)}
    rows["full precision"] |= vision.score_retrieval(model, scenes, cells[:8], 4, 16, True)
    told = {"full precision": captions(model, tokenizer, scenes, cells[:2])}
    config = FreeActConfig(kv_bits=4, dataset=calibration, n_samples=options.samples)
    types = measure_types(model, calibration, config)
    del model
    gc.collect()

    console.rule("Quantize to W4A4KV4, save, reload")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    records = model.__dict__["_freeact_records"]
    console.print(f"Token types: {', '.join(model.hf_quantizer.quantization_config.token_types)}")
    model.save_pretrained(options.out / "w4a4kv4")
    model = (
        LlavaForConditionalGeneration.from_pretrained(options.out / "w4a4kv4", dtype=torch.float32).eval().to(device)
    )
    rows["W4A4KV4"] = vision.score_captions(model, scenes, cells, 8, True)
    rows["W4A4KV4"] |= vision.score_retrieval(model, scenes, cells[:8], 4, 16, True)
    told["W4A4KV4"] = captions(model, tokenizer, scenes, cells[:2])
    page = write_report(types, options.out / "page", f"a small vision-language model on {Path(where).name}", records)

    for i in range(2):
        right = tokenizer.decode(scenes.caption(cells[i].tolist()), skip_special_tokens=True)
        console.print(f"\n[bold]{right}[/bold]", highlight=False)
        for name, made in told.items():
            console.print(f"  [cyan]{name}:[/cyan] ", end="")
            console.print(made[i].strip(), markup=False, highlight=False)
    table = Table(title="captions of held-out scenes", caption=f"{len(cells)} scenes")
    for heading in ("model", "nats a token", "retrieved of 4"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    console.print(f"The page about the types: {page}", highlight=False, soft_wrap=True)
    return rows


if __name__ == "__main__":
    main()
