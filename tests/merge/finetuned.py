"""A tiny target trained on one kind of text and its fine-tune on another, to compare merges with plain interpolation."""

import random

import torch

from tests.merge.tiny import WORDS, build, texts, tokenizer


def other_texts(count: int = 60, seed: int = 0, length: int = 30) -> list[str]:
    """Sentences of another kind: sums, and words in another order."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        pairs = [(draw.randrange(30), draw.randrange(30)) for _ in range(length // 3)]
        lines.append(" ".join(f"{a}+{b}={a + b} {WORDS[(a + b) % len(WORDS)]}" for a, b in pairs))
    return lines


def batches(lines: list[str], length: int = 64) -> torch.Tensor:
    """Token windows `(n, length)`."""
    ids = [i for line in lines for i in tokenizer()(line + "\n")["input_ids"]]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def loss_on(model, windows: torch.Tensor) -> float:
    """Mean next-token loss."""
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


def train(model, windows: torch.Tensor, steps: int, rate: float, seed: int = 0, batch: int = 16):
    """Adam on random windows, everything trainable."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        pick = torch.randint(0, len(windows), (batch,), generator=draw)
        loss = model(input_ids=windows[pick], labels=windows[pick]).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def target_and_finetune(family: str = "llama", **sizes):
    """A trained target, a fine-tune of it on other text, and evaluation windows of both kinds."""
    own, other = batches(texts(400, seed=5)), batches(other_texts(400, seed=5))
    model = build(family, **sizes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.full_like(parameter, 0.0 if family == "gemma3_text" else 1.0)
        else:
            parameter.data *= 0.5
    train(model, own, 160, 3e-3)
    finetune = build(family, **sizes)
    finetune.load_state_dict(model.state_dict())
    train(finetune, torch.cat([own[: len(own) // 4], other]), 80, 7e-5, seed=1)
    return model, finetune, batches(texts(40, seed=6)), batches(other_texts(40, seed=6))
