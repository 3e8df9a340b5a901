"""Scores and losses of `adaptation.py`, and the batches that they are taken of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch

from benchmarks.merge.adaptation_plan import Arm
from benchmarks.merge.gifts import Lessons
from benchmarks.merge.texts import padded


#: Of a stream's loss beside the lessons'.
STREAM_WEIGHT = 1.0


def run_model(model, ids: torch.Tensor, states: bool = False):
    """Forward in bfloat16 on a GPU, in float32 elsewhere."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(input_ids=ids, use_cache=False, output_hidden_states=states)


@torch.no_grad()
def score(model, texts: list[list[int]], device: str) -> float:
    """Mean next-token loss in nats."""
    batch = 32 if device.startswith("cuda") else 4
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        ids, labels = padded(texts[start : start + batch], device)
        logits = run_model(model, ids).logits.float().flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    model.train()
    return total / count


def lesson_loss(model, batch: Lessons, arm: Arm, share: float) -> torch.Tensor:
    """Mean over positions: the text's own next token, and where the giver teaches, its distribution by `share`."""
    ids = batch.ids.long()
    output = run_model(model, ids, states=arm.stream is not None)
    logits = output.logits[:, :-1].float()
    normaliser = logits.logsumexp(-1)
    losses = normaliser - logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if arm.teacher is not None:
        answers = batch.probabilities[:, :-1].float()
        expected = (logits.gather(-1, batch.tokens[:, :-1].long()) * answers).sum(-1)
        taught = batch.taught[:, :-1]
        losses = torch.where(taught, (1 - share) * losses + share * (normaliser - expected), losses)
    counted = torch.arange(ids.shape[1] - 1, device=ids.device) < batch.lengths[:, None] - 1
    loss = losses[counted].mean()
    if arm.stream is not None:
        stream = output.hidden_states[-2].float()
        stream = stream / stream.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        loss = loss + STREAM_WEIGHT * (stream - batch.states.float())[batch.stated].square().mean()
    return loss


def joined(parts: list[Lessons]) -> Lessons:
    """Several batches as one; states only where all have them."""
    return Lessons(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Lessons)))


def draws(count: int, size: int, draw: torch.Generator) -> Iterator[list[int]]:
    """Batches of `size` out of `count`, in rounds of random order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=draw).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
