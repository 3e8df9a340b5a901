"""Starts everything on a GPU that a first calibration waits for: libraries, compilers, recorded steps."""

from __future__ import annotations

import sys
import time


def warm_up(device: str = "cuda", width: int = 576) -> None:
    """Quantize a block of random weights in closed form and by learning, twice; times go to standard error."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimum_freeact import FreeActConfig
    from optimum_freeact.api import quantize

    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": width // 64}
    ids = torch.randint(0, 64, (8, 256), generator=torch.Generator().manual_seed(0))
    for turn, preset in enumerate(("freeact-fast", "flatquant", "freeact-fast", "flatquant")):
        begun = time.perf_counter()
        few = {"epochs": 2} if preset == "flatquant" else {}
        asked = {"n_samples": 8, "seq_len": 256, "batch_size": 2, "progress": False, "calibration_device": device}
        try:
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1)).eval()
            quantize(model, FreeActConfig(preset=preset, dataset=ids, **asked, **few))
        except Exception as error:  # the jobs will tell
            print(f"warm-up: {preset} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"warm-up {turn}: {preset} {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
