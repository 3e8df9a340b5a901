"""Donors that know nothing: the same architecture with fresh random weights, for the control every result needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch


#: Everything but weights: what makes a folder of random weights loadable in the donor's place.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


def random_donor(donor: str | Path, out: str | Path, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write a checkpoint of the donor's architecture with freshly initialised weights and the donor's tokenizer.

    Args:
        donor (`str | Path`): the real donor's folder.
        out (`str | Path`): folder to write.
        seed (`int`, *optional*, defaults to 0): of the initialisation; torch's global generator is left as it was.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): of the written weights.

    Returns:
        `Path` of the folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    donor, out = Path(donor), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(donor), dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    for pattern in COMPANIONS:
        for path in donor.glob(pattern):
            if not (out / path.name).exists() and not path.name.endswith("index.json"):
                shutil.copy(path, out / path.name)
    return out
