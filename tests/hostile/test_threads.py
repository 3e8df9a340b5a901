"""Two quantized models at work in threads at the same time, and two quantizations at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.helpers.quantized import logits, quantized
from tests.helpers.tiny_models import sample_ids


def work(model, seed):
    """Logits of several batches of different sizes, and a generation with a quantized cache."""
    found = [logits(model, sample_ids(1 + seed % 3, 8 + 3 * i, seed=seed + i)) for i in range(6)]
    ids = sample_ids(2, 6, seed=seed)
    found.append(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    )
    return found


def test_models_in_threads_do_not_disturb_each_other():
    models = [
        quantized("llama", kv_bits=4),
        quantized("qwen3", preset="quarot"),
        quantized("llama", preset="rtn", kv_bits=8),
    ]
    jobs = [(model, seed) for seed in range(4) for model in models]  # each model in four threads, three models at once
    expected = [work(*job) for job in jobs]
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return work(*job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(run, jobs))
    for ours, theirs in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_quantizations_in_threads_do_not_disturb_each_other():
    kinds = [("llama", "freeact"), ("qwen3", "quarot"), ("llama", "smoothquant"), ("gemma2", "freeact")]
    expected = [logits(quantized(family, preset=preset)) for family, preset in kinds]
    with ThreadPoolExecutor(len(kinds)) as pool:
        found = list(pool.map(lambda kind: logits(quantized(kind[0], preset=kind[1])), kinds))
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)
