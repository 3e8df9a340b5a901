"""Build the `prompt_translations` column: from flat columns, or by joining parallel prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from datasets import Dataset

from trl_mlc.prompts import COLUMN, translations_of


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def from_flat_columns(dataset: Dataset, prefix: str = "prompt_", languages: Sequence[str] | None = None) -> Dataset:
    """Gather columns `prompt_zh`, `prompt_sw`, ... (the form of the paper's data) into one column.

    Args:
        dataset (`datasets.Dataset`): values are texts, lists of messages, or lists of `{"from", "value"}` turns, which
            become messages; the `prompt` column is converted likewise.
        prefix (`str`, *optional*, defaults to `"prompt_"`).
        languages (`Sequence[str]`, *optional*): the names after the prefix; all that have it, if not given.

    Returns:
        `datasets.Dataset`: with `prompt_translations` and without the flat columns.

    Raises:
        `ValueError`: if no column has the prefix, a named one is missing, or the result column exists.
    """
    present = [
        name.removeprefix(prefix) for name in dataset.column_names if name.startswith(prefix) and name != COLUMN
    ]
    chosen = present if languages is None else list(languages)
    missing = sorted(set(chosen) - set(present))
    if missing or not chosen:
        raise ValueError(
            f"The dataset has no columns {[prefix + name for name in missing] or prefix + '*'}; its columns are "
            f"{sorted(dataset.column_names)}."
        )
    if COLUMN in dataset.column_names:
        raise ValueError(f"The dataset already has a column {COLUMN!r}; remove one of the two forms.")

    def gather(row: dict) -> dict:
        found = {COLUMN: {name: _messages(row[prefix + name]) for name in chosen}}
        return {**found, "prompt": _messages(row["prompt"])} if "prompt" in row else found

    return dataset.map(gather, remove_columns=[prefix + name for name in chosen])


def join_translations(
    dataset: Dataset, translations: Mapping[str, Sequence | Mapping], key: str | None = None
) -> Dataset:
    """Add parallel prompts to a dataset as the translations column.

    Args:
        dataset (`datasets.Dataset`): any TRL dataset.
        translations (`Mapping[str, Sequence | Mapping]`): per language, either one prompt (or `None`) per row in the
            order of the dataset, or a mapping from the value of column `key` to a prompt.
        key (`str`, *optional*): needed for mappings; a row whose value is absent lacks that language.

    Returns:
        `datasets.Dataset` with the column `prompt_translations`.

    Raises:
        `ValueError`: for a list of another length, a mapping without `key`, or a key that is no column.
    """
    if key is not None and key not in dataset.column_names:
        raise ValueError(f"key={key!r} is not one of the columns {sorted(dataset.column_names)}.")
    columns: dict[str, list] = {}
    for language, table in translations.items():
        if isinstance(table, Mapping):
            if key is None:
                raise ValueError(f"Translations for {language!r} are a mapping; say with key= which column it is by.")
            columns[language] = [table.get(value) for value in dataset[key]]
        elif len(table) != len(dataset):
            raise ValueError(f"Translations for {language!r} have {len(table)} entries, the dataset {len(dataset)}.")
        else:
            columns[language] = list(table)
    rows = [{language: column[i] for language, column in columns.items()} for i in range(len(dataset))]
    return dataset.add_column(COLUMN, rows)


def shuffled_translations(dataset: Dataset, seed: int = 0, each: bool = False) -> Dataset:
    """The negative control: every row gets another row's translations. No row keeps one of its own.

    A gain that survives this is not due to translation. By default the translations of a row are moved as a whole:
    among themselves they are still translations, and only the tie to the anchor is broken. With `each`, every language
    is moved on its own, and no two prompts of a row belong together but by chance.

    Args:
        dataset (`datasets.Dataset`): with the column; at least two rows.
        seed (`int`, *optional*, defaults to 0).
        each (`bool`, *optional*, defaults to `False`): move each language on its own.
    """
    column = list(dataset[COLUMN])
    if each:
        rows = [translations_of(row) for row in dataset.select_columns([COLUMN])]
        names = sorted(set().union(*rows))
        given = {name: _one_cycle(len(rows), f"{seed}-{name}") for name in names}
        moved = [{name: rows[given[name][i]].get(name) for name in names} for i in range(len(rows))]
    else:
        cycle = _one_cycle(len(column), seed)
        moved = [column[cycle[i]] for i in range(len(column))]
    return dataset.remove_columns(COLUMN).add_column(COLUMN, moved)


def _one_cycle(count: int, seed: int | str) -> dict[int, int]:
    """A random permutation without a fixed point: one cycle through all."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def _messages(value):
    """A list of `{"from", "value"}` turns as messages; anything else unchanged."""
    if isinstance(value, list) and value and "from" in value[0]:
        return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in value]
    return value
