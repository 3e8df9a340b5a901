"""A masked-diffusion language model, adapted in minutes from an autoregressive one, and how it is scored.

The recipe of Dream (2508.15487): take the weights of an autoregressive model, let every token see every other, keep the
logits shifted by one, and train on masked cross-entropy with a masked share t uniform in (0, 1), weighted by 1/t.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optimum_freeact.models.llada  # noqa: F401
from optimum_freeact.models.denoise import denoise, predictions
from optimum_freeact.models.llada import LladaConfig, LladaForMaskedLM


RATIOS = (0.15, 0.50, 0.85)
MASK_ID = 16  # of SmolLM2: "<empty_output>", reserved for notebooks and absent from the texts
# characters: training and calibration read the text before the cut, evaluation what follows it
CUTS = {"handbook": 850_000, "brown": 5_600_000}


# ---------------------------------------------------------------- making it
def adapt(source: Any, mask_id: int) -> LladaForMaskedLM:
    """A bidirectional model with the weights of a Llama for causal language modelling."""
    plain = {k: v for k, v in source.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    config = LladaConfig(**plain, mask_token_id=mask_id, shifted_logits=True)
    model = LladaForMaskedLM._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(source.state_dict())
    return model.to(source.dtype)


def mask_rows(ids: torch.Tensor, ratio: torch.Tensor, mask_id: int, generator: torch.Generator) -> torch.Tensor:
    """Which tokens of `ids` `(batch, tokens)` are masked: each with its row's probability, never a row's first."""
    draws = torch.rand(ids.shape, generator=generator, device=ids.device)
    masked = draws < ratio[:, None]
    masked[:, 0] = False
    return masked & (ids != mask_id)


def diffusion_losses(
    model: nn.Module, ids: torch.Tensor, generator: torch.Generator, part: int, **arguments: Any
) -> Iterator[torch.Tensor]:
    """Masked cross-entropy, each row weighted by 1/t; the rows' t are spread evenly over (0, 1). For `part` rows at a time:
    the loss is the sum.
    """
    offset = torch.rand(1, generator=generator, device=ids.device)
    ratio = ((torch.arange(len(ids), device=ids.device) / len(ids) + offset) % 1).clamp(0.02, 1.0)
    mask_id = model.config.mask_token_id
    masked = mask_rows(ids, ratio, mask_id, generator)
    for some in torch.arange(len(ids), device=ids.device).split(part):
        given, hidden = ids[some], masked[some]
        logits = model(input_ids=given.masked_fill(hidden, mask_id), use_cache=False, **arguments).logits
        rows, columns = hidden.nonzero(as_tuple=True)
        chosen = logits[rows, columns - 1].float()  # shifted: the logits before a token are its own
        losses = nn.functional.cross_entropy(chosen, given[rows, columns], reduction="none")
        yield (losses / ratio[some][rows]).sum() / ids.numel()


def descend(losses: Iterator[torch.Tensor]) -> torch.Tensor:
    """Gradients of a sum of losses, one after the other; returns the sum."""
    total = torch.zeros(())
    for loss in losses:
        loss.backward()
        total = total.to(loss.device) + loss.detach()
    return total


def train(
    model: nn.Module,
    stream: torch.Tensor,
    *,
    steps: int,
    batch: int,
    length: int,
    rate: float = 4e-4,
    seed: int = 0,
    seconds: float | None = None,
    part: int | None = None,
    log: Any = print,
) -> dict:
    """Adapt in place with AdamW, a warm-up and a cosine, in bfloat16 where there is a GPU.

    Args:
        model: From [`adapt`], float32, on its device.
        stream (`torch.Tensor` of shape `(tokens,)`): Token ids of the training text.
        part (`int`, *optional*): So many rows of a batch at a time, for memory.
        seconds (`float`, *optional*): Stop earlier; the schedule then follows the clock.

    Returns:
        Steps, seconds and last losses.
    """
    device = next(model.parameters()).device
    stream = stream.to(device)
    fast = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fast)
    generator = torch.Generator(device=device).manual_seed(seed)
    start, losses, done = time.perf_counter(), [], 0
    model.train()
    for step in range(steps):
        spent = 0.0 if seconds is None else (time.perf_counter() - start) / seconds
        share = max(step / steps, spent)
        if share >= 1:
            break
        scale = min(1.0, (step + 1) / 40) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        starts = torch.randint(len(stream) - length + 1, (batch,), generator=generator, device=device)
        ids = stream[starts[:, None] + torch.arange(length, device=device)]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
            loss = descend(diffusion_losses(model, ids, generator, part or batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if step % 50 == 0 or step == steps - 1:
            losses.append(float(loss))
            log(f"step {step} loss {losses[-1]:.3f} {time.perf_counter() - start:.0f} s")
    model.eval()
    return {"steps": done, "seconds": time.perf_counter() - start, "loss": losses[-1]}


# ---------------------------------------------------------------- its texts
def read_stream(tokenizer: Any, path: str, start: int, stop: int | None) -> torch.Tensor:
    """Token ids of a range of characters of a file."""
    text = Path(path).read_text(encoding="utf-8")[start:stop]
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


def windows_of(stream: torch.Tensor, n: int, length: int) -> torch.Tensor:
    """`n` windows `(n, length)` spread evenly over a stream, without overlap."""
    rows = stream[: len(stream) // length * length].view(-1, length)
    if len(rows) < n:
        raise ValueError(f"The text has {len(rows)} windows of {length} tokens; {n} are asked for.")
    return rows[torch.linspace(0, len(rows) - 1, n).long()]


def windows_beside(stream: torch.Tensor, n: int, length: int) -> torch.Tensor:
    """At most `n` windows that [`windows_of`] does not take."""
    rows = stream[: len(stream) // length * length].view(-1, length)
    left = torch.ones(len(rows), dtype=torch.bool)
    left[torch.linspace(0, len(rows) - 1, n).long()] = False
    return rows[left][:n]


# ---------------------------------------------------------------- scoring it
@torch.no_grad()
def score_masked(
    model: nn.Module, windows: torch.Tensor, ratio: float, *, prefix: int = 0, batch: int = 16, seed: int = 0
) -> dict[str, float]:
    """Negative log-likelihood (nats) and accuracy at masked tokens, the same ones for every model.

    Args:
        windows (`torch.Tensor` of shape `(n, tokens)`): Held-out ids.
        ratio (`float`): Share of masked tokens.
        prefix (`int`, *optional*, defaults to 0): So many tokens come first, unmasked, and reach the rest through the KV
            cache only, as in block-wise decoding; 0 runs all tokens at once without a cache.
    """
    device, mask_id = next(model.parameters()).device, model.config.mask_token_id
    generator = torch.Generator().manual_seed(seed)
    nll, right, count = 0.0, 0, 0
    for ids in windows.split(batch):
        body = ids[:, prefix:]
        masked = mask_rows(body, torch.full((len(ids),), ratio), mask_id, generator)
        noisy, before = body.masked_fill(masked, mask_id).to(device), None
        if prefix:
            told = model(input_ids=ids[:, :prefix].to(device), use_cache=True)
            before = told.logits[:, -1:]
            told = model(input_ids=noisy, past_key_values=told.past_key_values, use_cache=True)
        else:
            told = model(input_ids=noisy, use_cache=False)
        logits = predictions(told.logits, before, model.config.shifted_logits)[masked.to(device)].float()
        wanted = body[masked].to(device)
        nll += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"masked_nll": nll / count, "masked_accuracy": right / count}


@torch.no_grad()
def score_generated(
    model: nn.Module, judge: nn.Module, prompts: torch.Tensor, new_tokens: int, steps: int, use_cache: bool
) -> dict[str, float]:
    """Quality of generated text: its likelihood under the autoregressive model, and the share of distinct bigrams.

    The likelihood alone rewards repetition; the bigrams show it.
    """
    device = next(model.parameters()).device
    block = max(1, new_tokens // 4)
    ids = denoise(model, prompts.to(device), new_tokens, steps, block=block, use_cache=use_cache, temperature=0.3)
    logits = judge.to(device)(input_ids=ids).logits[:, prompts.shape[1] - 1 : -1].float()
    made = ids[:, prompts.shape[1] :]
    nll = float(nn.functional.cross_entropy(logits.flatten(0, 1), made.flatten()))
    pairs = [len({tuple(p) for p in row.unfold(0, 2, 1).tolist()}) / (new_tokens - 1) for row in made.cpu()]
    return {"generated_nll": nll, "generated_distinct_bigrams": sum(pairs) / len(pairs)}
