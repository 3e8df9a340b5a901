"""Put the parallel prompts of a batch beside what the trainer's own collator makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container

import torch

from trl_mlc.devices import sent


KEY = "mlc_prompts"
IDS, LANGUAGES = "mlc_input_ids", "mlc_language_ids"
FOREIGN = (IDS, LANGUAGES, "prompt_translations")


class PromptCollator:
    """Wrap a collator: its batch is unchanged, and prompts ride along under one key.

    Args:
        inner (`Callable`): the trainer's collator. It never sees the MLC columns.
        pad_token_id (`int`): fills the right side; masked, so its value does not matter.
    """

    def __init__(self, inner: Callable, pad_token_id: int):
        self.inner = inner
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict:
        """Collate; rows without MLC columns (an evaluation set without translations) make a plain batch."""
        batch = self.inner([{k: v for k, v in row.items() if k not in FOREIGN} for row in rows])
        if IDS in rows[0]:
            batch[KEY] = collate_prompts(rows, self.pad_token_id)
        return batch


def collate_prompts(rows: list[dict], pad_token_id: int) -> dict:
    """Flatten the groups of a batch into right-padded rows of token ids.

    Ids are int64 from here on: in bfloat16 every id above 256 would be rounded.

    Args:
        rows (`list[dict]`): each with `mlc_input_ids` (list of lists) and `mlc_language_ids`.
        pad_token_id (`int`).

    Returns:
        `dict`: `input_ids`, `attention_mask` (P, T); `row`, `slot`, `language` (P,), all int64; lists `lengths` (of
        their tokens) and `places` (row and language), for which no device need be asked; ints `n_rows`, `width`
        (largest group). A batch without any prompt holds one padding prompt with row -1, so that every process runs
        the same number of forwards.
    """
    flat = [
        (ids, n, slot, language)
        for n, row in enumerate(rows)
        for slot, (ids, language) in enumerate(zip(row[IDS], row[LANGUAGES], strict=True))
    ] or [([pad_token_id], -1, 0, 0)]
    lengths = [len(ids) for ids, *_ in flat]
    inside = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)  # (P, T)
    input_ids = torch.full(inside.shape, pad_token_id, dtype=torch.int64)
    input_ids[inside] = torch.tensor([token for ids, *_ in flat for token in ids], dtype=torch.int64)
    row, slot, language = torch.tensor([place for _, *place in flat], dtype=torch.int64).unbind(1)
    return {
        "input_ids": input_ids,
        "attention_mask": inside.long(),
        "row": row,
        "slot": slot,
        "language": language,
        "lengths": lengths,
        "places": [(n, language) for _, n, _, language in flat],
        "n_rows": len(rows),
        "width": max(1, *(len(r[IDS]) for r in rows)) if rows else 1,
    }


def select_prompts(prompts: dict, languages: Container[int]) -> dict:
    """The prompts in `languages`, groups closed up; the first one with row -1 if there is none. No device is waited for."""
    indices = [i for i, (_, language) in enumerate(prompts["places"]) if language in languages]
    places = [prompts["places"][i] for i in indices] or [(-1, 0)]
    slots, seen = [], Counter[int]()
    for row, _ in places:
        slots.append(seen[row])
        seen[row] += 1
    device = prompts["input_ids"].device
    chosen, row, slot = sent(torch.tensor([indices or [0], [row for row, _ in places], slots]), device)
    found = {key: prompts[key][chosen] for key in ("input_ids", "attention_mask", "language")}
    lengths = [prompts["lengths"][i] for i in indices or [0]]
    return {
        **prompts,
        **found,
        "row": row,
        "slot": slot,
        "lengths": lengths,
        "places": places,
        "width": max(slots) + 1,
    }


def to_groups(vectors: torch.Tensor, prompts: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense groups `(n_rows, width, d)` and their mask from one vector per prompt; missing entries are zero."""
    real = prompts["row"] >= 0
    place = (prompts["row"].clamp_min(0), prompts["slot"])
    shape = (prompts["n_rows"], prompts["width"])
    mask = torch.zeros(shape, dtype=torch.bool, device=vectors.device).index_put(place, real)
    values = vectors * real.unsqueeze(1)
    return values.new_zeros(*shape, values.shape[1]).index_put(place, values, accumulate=True), mask
