"""The README.md of a saved model: what it is, how it was made, how to load it."""

from __future__ import annotations

import json

from optimum_freeact.config import FreeActConfig
from optimum_freeact.config_fields import RECORDED
from optimum_freeact.report.sizes import QuantizedSize, human


TEMPLATE = """\
---
{front}
---

# {name} in {scheme}

{base} with its decoder linears quantized by `optimum_freeact` (hf-concord):
preset `{preset}`, weights in {weight_bits} bits, activations in {activation_bits} bits, KV cache in {kv_bits} bits.
Embeddings, output head and norms are as in the original. The original model's licence and terms apply.

## Load

```python
import {module}  # makes transformers know {known}; pip install hf-concord
from transformers import {auto}, AutoTokenizer
{more}
model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
{example}```

Without the import, loading stops with a size mismatch instead of running on wrong weights.

## Size

| quantized linears | their inputs | stored | in bfloat16 | ratio |
| ---: | ---: | ---: | ---: | ---: |
| {n_linears} | {n_inputs} | {stored} | {bf16} | {ratio:.3f} |

## Calibration

{n_samples} samples of {seq_len} tokens from `{dataset}`, seed {seed}, {seconds} seconds. Relative error of each block's
output on the last calibration batch (energy of the error over energy of the output):

| block | error |
| ---: | ---: |
{errors}

## Settings

```json
{settings}
```
"""

CHAT = """\
messages = [{"role": "user", "content": "What is a cat?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]))
"""
TEXT = """\
inputs = tokenizer("The cat", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""
HIDDEN = """\
prompt = tokenizer("The cat", return_tensors="pt").input_ids
print(tokenizer.decode(denoise(model, prompt, new_tokens=64, steps=32)[0]))
"""


def _usage(auto: str, loader: str | None, masked: bool, chat: bool) -> dict[str, str]:
    """What the page's example needs for a kind of model."""
    return {
        "module": loader or "optimum_freeact",
        "known": "this kind of model, and this quantization" if loader else "this quantization",
        "auto": auto,
        "more": "from optimum_freeact.models.denoise import denoise\n" if masked else "",
        "example": HIDDEN if masked else CHAT if chat else TEXT,
    }


def model_card(
    *,
    base: str,
    on_hub: bool,
    folder: str,
    dataset: str,
    config: FreeActConfig,
    size: QuantizedSize,
    chat: bool,
    auto: str = "AutoModelForCausalLM",
    loader: str | None = None,
    masked: bool = False,
) -> str:
    """The page's text.

    Args:
        base (`str`): Name of the full-precision model.
        on_hub (`bool`): Whether `base` is a name on the hub, which then goes into the metadata.
        folder (`str`): Name of the saved folder.
        dataset (`str`): Name of the calibration data.
        config ([`FreeActConfig`]): With the record of its calibration.
        size ([`QuantizedSize`]): Of the quantized linears.
        chat (`bool`): Whether the tokenizer has a chat template.
        auto (`str`, *optional*): Which of transformers' automatic classes loads it.
        loader (`str`, *optional*): The module of this package that makes transformers know the kind of model.
        masked (`bool`, *optional*, defaults to `False`): Whether it is a masked-diffusion model.
    """
    sees = auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    front = ["library_name: transformers", f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}"]
    if on_hub:
        front = [f"base_model: {base}", "base_model_relation: quantized", *front]
    front += ["tags:", "- freeact", f"- {config.scheme.lower()}"]
    record = config.calibration_record
    settings = {k: v for k, v in config.to_dict().items() if k not in RECORDED}
    return TEMPLATE.format(
        front="\n".join(front),
        name=base,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        folder=folder,
        dataset=dataset,
        **_usage(auto, loader, masked, chat),
        scheme=config.scheme,
        preset=config.preset,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        kv_bits=config.kv_bits,
        n_linears=size.n_linears,
        n_inputs=size.n_inputs,
        stored=human(size.stored_bytes),
        bf16=human(size.bf16_bytes),
        ratio=size.ratio,
        n_samples=record["n_samples"],
        seq_len=record["seq_len"],
        seed=config.seed,
        seconds=record["seconds"],
        errors="\n".join(f"| {block} | {error:.3g} |" for block, error in enumerate(record["output_error"])),
        settings=json.dumps(settings, indent=2, sort_keys=True),
    )
