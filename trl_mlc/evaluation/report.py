"""Measure one model on parallel prompts, in one call, to one JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_mlc.early_exit import check_layer, decoder_of
from trl_mlc.evaluation.geometry import language_geometry
from trl_mlc.evaluation.preferences import (
    accuracies,
    anchor_agreement,
    completion_log_probs,
    pairwise_agreement,
    perplexity,
    variance_x100,
)
from trl_mlc.pooling import POOLINGS
from trl_mlc.prompts import COLUMN, prompt_group, tokenize_prompt, translations_of
from trl_mlc.scan import prompt_states


logger = logging.getLogger(__name__)


@dataclass
class EvaluationReport:
    """What was found, plain JSON.

    Attributes:
        languages (`dict[str, dict[str, float]]`): metrics per language. `accuracy`, `margin` (nats), `agreement` with
            the anchor, `retrieval_at_1`, `centred_cosine`, `cross_prompt_cosine`, `perplexity`, `prompts`; those that
            cannot be computed from the rows are absent.
        overall (`dict[str, float]`): `accuracy_variance_x100`, `pairwise_agreement` and means over languages.
        settings (`dict`): anchor, layer, pooling, number of rows.
    """

    languages: dict[str, dict[str, float]]
    overall: dict[str, float]
    settings: dict = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Read what [`save`] wrote.

        Raises:
            `ValueError`: for a file that is no report.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no report of `trl-mlc evaluate --output` ({error}).") from error

    def table(self, before: EvaluationReport | None = None) -> str:
        """The report as aligned text, one language per line; with an earlier report, each number as `before -> now`."""
        columns = list(dict.fromkeys(name for found in self.languages.values() for name in found))
        first = max(9, *(len(name) for name in self.languages))

        def cell(found: dict[str, float], earlier: dict[str, float], name: str, digits: int) -> str:
            if name not in found:
                return "-"
            now = f"{found[name]:.{0 if name == 'prompts' else digits}f}"
            return f"{earlier[name]:.{digits}f} -> {now}" if name in earlier and name != "prompts" else now

        rows = []
        for language, found in self.languages.items():
            earlier = before.languages.get(language, {}) if before else {}
            rows.append([language, *(cell(found, earlier, name, 3) for name in columns)])
        table = [["language", *columns], *rows]
        widths = [first, *(max(len(row[i]) for row in table) for i in range(1, len(columns) + 1))]
        lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        earlier = before.overall if before else {}
        return "\n".join([*lines, *(f"{name}: {cell(self.overall, earlier, name, 4)}" for name in self.overall)])


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping],
    anchor: str = "en",
    languages: Sequence[str] | None = None,
    layer: int | None = None,
    pooling: str = "last",
    texts: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 16,
) -> EvaluationReport:
    """Score preferences, agreement, geometry and perplexity in every language.

    Args:
        model: a causal language model (a PEFT wrapper is fine).
        tokenizer: its tokenizer.
        rows (`Iterable[Mapping]`): `prompt`, `prompt_translations`; with `chosen` and `rejected`, preferences are
            scored too.
        anchor (`str`, *optional*, defaults to `"en"`): language of the prompts.
        languages (`Sequence[str]`, *optional*): besides the anchor; all, if not given.
        layer (`int`, *optional*): hidden state for the geometry; 0.8 of the depth, if not given.
        pooling (`str`, *optional*, defaults to `"last"`).
        texts (`Mapping[str, Sequence[str]]`, *optional*): running text per language for perplexity; the prompts
            themselves, if not given.
        batch_size (`int`, *optional*, defaults to 16).

    Raises:
        `ValueError`: for no rows, a requested language that no row has, or a layer out of range.
    """
    rows = [dict(row) for row in rows]
    groups = [prompt_group(row, anchor, languages) for row in rows]
    names = list(dict.fromkeys([anchor, *sorted({name for group in groups for name in group})]))
    _check(rows, names, languages, pooling, batch_size)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = decoder_of(base)
    depth = base.config.get_text_config().num_hidden_layers
    layer = check_layer(round(0.8 * depth) if layer is None else layer, decoder)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    overall: dict[str, float] = {}
    was_training = model.training
    model.eval()
    try:
        if _have_pairs(rows):
            overall |= _preferences(model, tokenizer, rows, groups, names, found, batch_size)
        ids = [{name: tokenize_prompt(tokenizer, g[name], row) for name in g} for g, row in zip(groups, rows)]
        _geometry(decoder, ids, names, anchor, layer, pooling, found, batch_size)
        for name in names if texts is None else [name for name in names if name in texts]:
            lines = [_plain(g[name]) for g in groups if name in g] if texts is None else texts[name]
            found[name]["perplexity"] = perplexity(model, [tokenizer(text=t)["input_ids"] for t in lines], batch_size)
    finally:
        model.train(was_training)
    for metric in ("retrieval_at_1", "centred_cosine", "cross_prompt_cosine"):
        values = [found[name][metric] for name in names if metric in found[name]]
        if values:
            overall[f"mean_{metric}"] = sum(values) / len(values)
    settings = {"anchor": anchor, "layer": layer, "pooling": pooling, "rows": len(rows)}
    return EvaluationReport(found, overall, settings)


def _check(
    rows: Sequence[Mapping], names: list[str], languages: Sequence[str] | None, pooling: str, batch_size: int
) -> None:
    """Refuse what cannot be scored, and say what will not be."""
    unknown = sorted(set(languages or []) - set(names))
    if not rows or unknown:
        present = sorted({name for row in rows for name in translations_of(row)})
        raise ValueError(f"Got {len(rows)} rows; languages {unknown} are in none of them (they have {present}).")
    if len(names) == 1:
        logger.warning("No row has a translation in column %r: only the anchor language is scored.", COLUMN)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}.")


def _have_pairs(rows: Sequence[Mapping]) -> bool:
    """Whether every row has a chosen and a rejected answer; says so where only some do."""
    sides = ("chosen", "rejected")
    pairs = sum(all(row.get(side) is not None for side in sides) for row in rows)
    if pairs < len(rows) and any(row.get(side) is not None for row in rows for side in sides):
        logger.warning(
            "%d of %d rows lack 'chosen' or 'rejected': preferences are not scored.", len(rows) - pairs, len(rows)
        )
    return pairs == len(rows)


def _preferences(model, tokenizer, rows, groups, names, found, batch_size: int) -> dict[str, float]:
    """Fill in accuracy, margin and agreement per language; return what is between languages."""
    present = torch.zeros(len(rows), len(names), dtype=torch.bool)
    pairs, places = [], []
    for n, (row, group) in enumerate(zip(rows, groups, strict=True)):
        for name, prompt in group.items():
            present[n, names.index(name)] = True
            pairs += [tokenized_pair(tokenizer, prompt, row[side], row) for side in ("chosen", "rejected")]
            places.append((n, names.index(name)))
    scores = completion_log_probs(model, pairs, batch_size)
    margins = torch.zeros(present.shape, dtype=torch.float64)
    for i, place in enumerate(places):
        margins[place] = scores[2 * i] - scores[2 * i + 1]
    right, agree = accuracies(margins, present), anchor_agreement(margins, present, 0)
    means = (margins * present).sum(0) / present.sum(0)
    for i, name in enumerate(names):
        found[name] |= {"prompts": int(present[:, i].sum()), "accuracy": right[i].item(), "margin": means[i].item()}
        found[name] |= {"agreement": agree[i].item()}
    return {
        "mean_accuracy": right.mean().item(),
        "accuracy_variance_x100": variance_x100(right),
        "pairwise_agreement": pairwise_agreement(margins, present),
    }


def _geometry(decoder, ids, names, anchor: str, layer: int, pooling: str, found, batch_size: int) -> None:
    """Fill in retrieval and cosines, each language on the rows it shares with the anchor."""

    def states_of(name: str, rows: list[int]) -> torch.Tensor:
        return prompt_states(decoder, [[ids[i][name]] for i in rows], [layer], pooling, batch_size)[0, 0]

    anchors = states_of(anchor, list(range(len(ids))))
    for name in names:
        shared = [i for i, group in enumerate(ids) if name in group]
        if len(shared) >= 2:
            states = {anchor: anchors[shared]} | ({} if name == anchor else {name: states_of(name, shared)})
            found[name] |= language_geometry(states, anchor)[name]


def tokenized_pair(tokenizer, prompt, completion, row: Mapping) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the completion after it, split where the two tokenizations part ways."""
    alone = tokenize_prompt(tokenizer, prompt, row)
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        both = list(tokenizer(text=prompt + completion + ("" if completion.endswith(end) else end))["input_ids"])
    else:
        extra = row.get("chat_template_kwargs") or {}
        encoded = tokenizer.apply_chat_template(prompt + list(completion), tokenize=True, return_dict=True, **extra)
        both = list(encoded["input_ids"])
    cut = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), min(len(alone), len(both)))
    return both[:cut], both[cut:]


def _plain(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
