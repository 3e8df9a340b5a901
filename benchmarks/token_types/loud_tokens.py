"""Does a type's mean survive a few loud tokens? `benchmarks/results/token_types_loud_0.json`, minutes on a CPU.

    python benchmarks/token_types/loud_tokens.py

A LLaVA around SmolLM2 as it is put together, before any training: its vision part is random, but the language model's own massive
activations are there, and tokens in the middle of a sequence get them too. The first blocks are quantized in several ways; rows say how
far each token's output is from full precision, relative to its own size, the median over tokens of a type.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.token_types import vision
from benchmarks.token_types.loudness import loudness
from benchmarks.token_types.scenes import Scenes
from benchmarks.token_types.vision_world import IMAGE_ID
from tools import result_files
from tools.assets import fetch


FAST, TWO = {"preset": "freeact-fast", "loudness_limit": None}, {"token_types": ["text", "sink"]}
CASES: dict[str, dict] = {
    "freeact-fast": FAST,
    "freeact-fast centring=none": {**FAST, "centring": "none"},
    "freeact-fast loudness_limit=1": {**FAST, "loudness_limit": 1.0},
    "freeact-fast loudness_limit=2": {**FAST, "loudness_limit": 2.0},
    "freeact-fast loudness_limit=4": {**FAST, "loudness_limit": 4.0},
    "freeact-fast types=text+sink": {**FAST, **TWO},
    "freeact-fast types=text+sink centring=none": {**FAST, **TWO, "centring": "none"},
    "freeact-fast types=text+sink loudness_limit=2": {**FAST, **TWO, "loudness_limit": 2.0},
    "freeact": {"preset": "freeact", "loudness_limit": None},
    "freeact loudness_limit=2": {"preset": "freeact", "loudness_limit": 2.0},
}


def assembled(source: str, n_blocks: int, seed: int) -> nn.Module:
    """The model with so many blocks of its decoder, the same at each call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = vision.assemble(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), IMAGE_ID, None, vision.SIGHT
    )
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:n_blocks]
    model.config.text_config.num_hidden_layers = decoder.config.num_hidden_layers = n_blocks
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Hidden states behind the last block."""
    return model.model(**inputs, use_cache=False).last_hidden_state


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="of the decoder (default 5)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the vision part: it decides whose tokens are loud (default 0)"
    )
    parser.add_argument("--cases", default=",".join(CASES), help="which (default: all)")
    parser.add_argument("--out", type=Path, default=result_files.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    from optimum_freeact import FreeActConfig
    from optimum_freeact.api import quantize

    if options.threads:
        torch.set_num_threads(options.threads)
    source = str(fetch("smollm2"))
    scenes = Scenes(str(fetch("pictures")), AutoTokenizer.from_pretrained(source), IMAGE_ID, 1, 2, 256)
    generator = torch.Generator().manual_seed(5)
    calibration = [scenes.inputs(scenes.draw(8, generator)) for _ in range(6)]
    test = scenes.inputs(scenes.draw(24, generator))
    ids, told = test["input_ids"], test["attention_mask"].bool()
    told[:, 0] = False  # the sink
    kinds = {"image": (ids == IMAGE_ID) & told, "text": (ids != IMAGE_ID) & told}
    model = assembled(source, options.blocks, options.seed)
    head = {"model": "assembled", "setting": "w4a4", "seed": options.seed}
    rows = [{**head, "method": "fp", "group": "full", **row} for row in loudness(model, calibration)]
    wanted = outputs(model, test)
    command = result_files.without_places(result_files.command_line())
    for name in options.cases.split(","):
        config = FreeActConfig(**CASES[name], dataset=calibration, n_samples=6, batch_size=1, progress=False)
        found = outputs(quantize(assembled(source, options.blocks, options.seed), config), test)
        errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        for kind, chosen in kinds.items():
            told_row = {"metric": "relative_error", "type": kind, "value": float(errors[chosen].median())}
            rows.append({**head, "method": name, "group": "trial", **told_row})
            print(f"{name:50s} {kind:6s} {rows[-1]['value']:.4f}", flush=True)
        made = f"token_types_loud_{options.seed}"
        source_of = "benchmarks.token_types.no_claims"
        path = result_files.write(made, rows, source_of, command, [options.seed], folder=options.out)
    print(f"Wrote {path.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
