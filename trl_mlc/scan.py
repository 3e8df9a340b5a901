"""Choose the layer by evidence: at which depth do states of translations find each other?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from trl_mlc.collator import collate_prompts
from trl_mlc.early_exit import n_layers
from trl_mlc.evaluation.geometry import cross_prompt_cosine, language_geometry
from trl_mlc.losses import consistency_loss
from trl_mlc.pooling import POOLINGS


class LayerScore(NamedTuple):
    """What one layer and pooling show.

    Attributes:
        layer (`int`): index into the hidden states.
        pooling (`str`): `"last"` or `"mean"`.
        retrieval (`float`): centred retrieval at 1 between the anchor and each language, mean over languages.
        cosine (`float`): centred cosine of translations, mean over languages.
        cross_prompt_cosine (`float`): raw cosine of different anchor prompts; near 1, prompts look alike.
        spectrum (`list[float]`): mean singular values of the groups, divided by the first.
    """

    layer: int
    pooling: str
    retrieval: float
    cosine: float
    cross_prompt_cosine: float
    spectrum: list[float]


@torch.no_grad()
def prompt_states(
    decoder: nn.Module, groups: Sequence[Sequence[Sequence[int]]], layers: Sequence[int], pooling: str, batch: int = 16
) -> torch.Tensor:
    """Pooled states of parallel prompts, in evaluation mode, without gradients.

    Args:
        decoder (`nn.Module`): from [`~trl_mlc.early_exit.decoder_of`].
        groups (`Sequence`): per prompt, per language, token ids; every group has the same languages in the same order.
        layers (`Sequence[int]`): indices into the hidden states.
        pooling (`str`): `"last"` or `"mean"`.
        batch (`int`, *optional*, defaults to 16): prompts per forward.

    Returns:
        `torch.Tensor` of shape `(layers, languages, prompts, d)`, float32, on the CPU.
    """
    device = next(decoder.parameters()).device
    flat = sorted(
        ((ids, n, m) for n, g in enumerate(groups) for m, ids in enumerate(g)), key=lambda item: len(item[0])
    )
    found: torch.Tensor | None = None
    was_training = decoder.training
    decoder.eval()
    try:
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            rows = [{"mlc_input_ids": [ids], "mlc_language_ids": [0]} for ids, _, _ in part]
            prompts = {k: v.to(device) for k, v in collate_prompts(rows, 0).items() if isinstance(v, torch.Tensor)}
            mask = prompts["attention_mask"]
            states = decoder(prompts["input_ids"], mask, use_cache=False, output_hidden_states=True).hidden_states
            pooled = torch.stack([POOLINGS[pooling](states[layer], mask).float().cpu() for layer in layers])
            if found is None:
                found = pooled.new_empty(len(layers), len(groups[0]), len(groups), pooled.shape[-1])
            for i, (_, n, m) in enumerate(part):
                found[:, m, n] = pooled[:, i]
    finally:
        decoder.train(was_training)
    return found


def scan_layers(
    decoder: nn.Module,
    groups: Sequence[Sequence[Sequence[int]]],
    poolings: Sequence[str] = ("last", "mean"),
    layers: Sequence[int] | None = None,
) -> list[LayerScore]:
    """Score every layer and pooling on parallel prompts; language 0 is the anchor.

    Args:
        decoder (`nn.Module`): from [`~trl_mlc.early_exit.decoder_of`].
        groups (`Sequence`): see [`prompt_states`]; at least two prompts in at least two languages.
        poolings (`Sequence[str]`, *optional*, defaults to both).
        layers (`Sequence[int]`, *optional*): all but the embedding, if not given.

    Raises:
        `ValueError`: for too few prompts or languages, or an unknown pooling.
    """
    if len(groups) < 2 or len(groups[0]) < 2:
        raise ValueError(
            f"A scan needs at least two prompts in at least two languages, got {len(groups)} prompts in "
            f"{len(groups[0]) if groups else 0} languages."
        )
    unknown = sorted(set(poolings) - set(POOLINGS))
    if unknown:
        raise ValueError(f"poolings must be among {list(POOLINGS)}, got {unknown}.")
    layers = list(range(1, n_layers(decoder) + 1)) if layers is None else list(layers)
    scores = []
    for pooling in poolings:
        states = prompt_states(decoder, groups, layers, pooling)
        scores += [_score(layer, pooling, states[i]) for i, layer in enumerate(layers)]
    return scores


def best_layer(scores: Sequence[LayerScore]) -> LayerScore:
    """The highest retrieval; among equals the one whose different prompts look least alike."""
    return max(scores, key=lambda score: (round(score.retrieval, 6), -score.cross_prompt_cosine))


def _score(layer: int, pooling: str, states: torch.Tensor) -> LayerScore:
    by_language = {str(m): states[m] for m in range(len(states))}
    geometry = language_geometry(by_language, "0")
    others = [geometry[str(m)] for m in range(1, len(states))]
    sigma = consistency_loss(states.transpose(0, 1)).singular_values.mean(0)
    return LayerScore(
        layer,
        pooling,
        sum(g["retrieval_at_1"] for g in others) / len(others),
        sum(g["centred_cosine"] for g in others) / len(others),
        cross_prompt_cosine(states[0]),
        (sigma / sigma[0]).tolist(),
    )


def complete_groups(rows: Sequence[dict], limit: int) -> list[list[list[int]]]:
    """Groups of token ids in one common order of languages, from rows that may lack some.

    Languages present in most rows are kept as long as that keeps more (rows x languages); rows that lack one of them
    are left out.

    Args:
        rows (`Sequence[dict]`): with `mlc_input_ids` and `mlc_language_ids`; language 0 is the anchor.
        limit (`int`): most rows returned.
    """
    tables = [dict(zip(row["mlc_language_ids"], row["mlc_input_ids"], strict=True)) for row in rows]
    tables = [table for table in tables if 0 in table]
    counts: dict[int, int] = {}
    for table in tables:
        for language in table:
            counts[language] = counts.get(language, 0) + 1
    ranked = sorted((n for n in counts if n != 0), key=lambda n: (-counts[n], n))
    best: tuple[int, list, list] = (0, [], [])
    for size in range(1, len(ranked) + 1):
        wanted = [0, *ranked[:size]]
        whole = [table for table in tables if all(n in table for n in wanted)][:limit]
        if len(whole) * len(wanted) > best[0]:
            best = (len(whole) * len(wanted), wanted, whole)
    return [[table[n] for n in best[1]] for table in best[2]]
