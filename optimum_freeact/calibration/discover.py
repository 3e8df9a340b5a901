"""Discovered types: clusters of token ids, found from calibration, as types of text for centring.

Ids are clustered by their mean normalised inputs over a few blocks (k-means, weighted by how often an id is seen); ids that
calibration never saw go to the cluster with the nearest embeddings. The result is a static table, id -> cluster, so the type
of a token costs one look-up, and its mean is subtracted exactly as any other type's.

Where it pays: a branch that carries K - 1 directions costs the same bytes as K means and never leaves more energy on the
calibration set, for the K means lie in the span of K - 1 differences (Eckart and Young). So clusters are for models that
run without the branch.
"""

from __future__ import annotations

import base64
import zlib

import torch
from torch import nn

from optimum_freeact.calibration.prepared import batches
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import block_linears, find_blocks


BLOCKS, SKETCH, ROUNDS = 4, 64, 25  # blocks looked at, random projections of each input, iterations of k-means


def kmeans(points: torch.Tensor, weights: torch.Tensor, k: int, rounds: int = ROUNDS) -> torch.Tensor:
    """Cluster of each point (k-means++ start, Lloyd's iterations), weighted.

    Args:
        points (`torch.Tensor` of shape `(n, d)`), weights (`torch.Tensor` of shape `(n,)`): On the CPU.
        k (`int`): Clusters; at most `n`.
    """
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.multinomial(weights, 1, generator=generator)]
    while len(centres) < k:
        distance = (torch.cdist(points, centres).square().amin(1) * weights).clamp_min(1e-12)
        centres = torch.cat((centres, points[torch.multinomial(distance, 1, generator=generator)]))
    nearest = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        mass = torch.zeros(k).index_add_(0, nearest, weights)
        total = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(mass[:, None] > 0, total / mass[:, None].clamp_min(1e-9), centres)
        nearest = torch.cdist(points, centres).argmin(1)
    return nearest


def cluster_ids(ids: torch.Tensor, inputs: list[torch.Tensor], embeddings: torch.Tensor, k: int) -> torch.Tensor:
    """Cluster of every id of a vocabulary.

    Args:
        ids (`torch.Tensor` of shape `(n,)`): Ids of the calibration tokens.
        inputs (`list[torch.Tensor]` of shape `(n, d)`): What some layers read at these tokens.
        embeddings (`torch.Tensor` of shape `(vocabulary, d)`): For the ids that were not seen.
        k (`int`): Number of clusters.
    """
    seen, inverse, count = ids.unique(return_inverse=True, return_counts=True)
    if len(seen) < k:
        raise ValueError(f"discovered_types={k}, but calibration holds {len(seen)} different ids: give more data.")
    generator, parts = torch.Generator().manual_seed(0), []
    for x in inputs:
        x = x - x.mean(0)
        sketch = x / x.square().mean().sqrt() @ (torch.randn(x.shape[1], SKETCH, generator=generator) / SKETCH**0.5)
        parts.append(torch.zeros(len(seen), SKETCH).index_add_(0, inverse, sketch) / count[:, None])
    cluster = kmeans(torch.cat(parts, 1), count.float(), k)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    centres = torch.zeros(k, unit.shape[1]).index_add_(0, cluster, unit[seen] * count[:, None])
    table = (unit @ torch.nn.functional.normalize(centres, dim=1).mT).argmax(1)
    table[seen] = cluster
    return table


@torch.no_grad()
def discover(model: nn.Module, samples: torch.Tensor | list[dict], config: FreeActConfig) -> torch.Tensor:
    """Cluster of every id of the model's vocabulary, from what its first linears read at a few blocks."""
    prefix, blocks = find_blocks(model)
    other = torch.tensor(
        [i for rule in (config.type_rules or {}).values() for i in rule.get("ids", [])], dtype=torch.long
    )
    seen: list[list[torch.Tensor]] = []
    handles = []
    for index in sorted({round(i) for i in torch.linspace(0, len(blocks) - 1, BLOCKS).tolist()}):
        first = next(
            iter(block_linears(blocks[index], f"{prefix}.{index}", config.modules_to_not_convert).values()), None
        )
        if first is not None:
            seen.append([])
            handles.append(first.register_forward_pre_hook(_note(seen[-1])))
    device, kept = next(model.parameters()).device, []
    try:
        for inputs in batches(samples, config.batch_size):
            model(
                **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, use_cache=False
            )
            ids = inputs["input_ids"].cpu()
            mask = inputs.get("attention_mask", torch.ones_like(ids)).cpu() != 0
            mask[:, 0] = False  # the sink
            kept.append((ids, mask & ~torch.isin(ids, other)))
    finally:
        for handle in handles:
            handle.remove()
    ids, mask = (torch.cat([pair[i].flatten() for pair in kept]) for i in (0, 1))
    found = [torch.cat(parts)[mask] for parts in seen]
    return cluster_ids(ids[mask], found, model.get_input_embeddings().weight.detach().cpu(), config.discovered_types)


def _note(parts: list[torch.Tensor]):
    def hook(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
        parts.append(args[0].flatten(0, -2).float().cpu())

    return hook


def add_discovered(model: nn.Module, samples: torch.Tensor | list[dict], config: FreeActConfig) -> None:
    """Find the clusters and write them into a config: types `text.1`, `text.2`, ... beside `text`, and the table."""
    table = discover(model, samples, config)
    names = [f"text.{cluster}" for cluster in range(1, config.discovered_types)]
    config.type_rules = {**config.type_rules, **{name: {"cluster": i} for i, name in enumerate(names, start=1)}}
    config.token_types = [*config.token_types, *names]
    config.cluster_table = base64.b64encode(zlib.compress(bytes(table.tolist()), 9)).decode()
