"""Token ids of parallel prompts beside the columns a TRL trainer makes."""

from __future__ import annotations

import logging

from datasets import Dataset, IterableDataset

from trl_mlc.prompts import COLUMN, prompt_group, tokenize_prompt, translations_of


logger = logging.getLogger(__name__)

IDS, LANGUAGES, DROPPED = "mlc_input_ids", "mlc_language_ids", "mlc_dropped"
COLUMNS = (IDS, LANGUAGES)


class LanguageTable:
    """Names of languages and their numbers: the anchor is 0, the rest by first sight; only ever appended to.

    Args:
        anchor (`str`): language of the `prompt` column.
    """

    def __init__(self, anchor: str):
        self.names = [anchor]

    def __len__(self) -> int:
        return len(self.names)

    def add(self, names: list[str]) -> dict[str, int]:
        """Append unknown names in sorted order; return the whole table as name -> number."""
        self.names += sorted(set(names) - set(self.names))
        return {name: i for i, name in enumerate(self.names)}


def languages_in(dataset: Dataset | IterableDataset, requested: list[str] | None) -> list[str]:
    """Languages of the translations column, all of them or the requested ones.

    Raises:
        `ValueError`: for streamed data without a request, or a requested language that no row has.
    """
    if isinstance(dataset, IterableDataset):
        if requested is None:
            raise ValueError(
                "The languages of a streamed dataset cannot be listed before training; name them with mlc_languages."
            )
        return list(requested)
    feature = dataset.features[COLUMN]
    if isinstance(feature, dict):
        found = set(feature)
    else:
        found = {name for row in dataset.select_columns([COLUMN]) for name in translations_of(row)}
    unknown = sorted(set(requested or []) - found)
    if unknown:
        raise ValueError(f"mlc_languages names {unknown}, but column {COLUMN!r} has only {sorted(found)}.")
    return sorted(found if requested is None else requested)


def encode_prompts_of(dataset, tokenizer, args, table: LanguageTable, name: str = "train"):
    """Add the token ids of every row's prompts and their language numbers to a dataset.

    A dataset that already has them is returned as it is, and so is one without a translations column, unless it is
    the training set.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows as [`~trl_mlc.prompts.prompt_group`] reads them.
        tokenizer: a tokenizer or processor.
        args ([`~trl_mlc.arguments.MLCArguments`]): anchor, languages and length limit.
        table ([`LanguageTable`]): extended by languages not seen before.
        name (`str`, *optional*, defaults to `"train"`): for messages; `"train"` must have translations.

    Returns:
        the dataset with columns `mlc_input_ids` (list of lists) and `mlc_language_ids`.

    Raises:
        `ValueError`: if the training set lacks the column, or no row has two usable prompts.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if IDS in columns:
        return dataset
    if COLUMN not in columns:
        if name != "train":
            return dataset
        raise ValueError(
            f"The training data has columns {sorted(columns)} but no {COLUMN!r}; add it (join_translations), gather flat "
            "columns (from_flat_columns, --flat_prefix prompt_), or set mlc_weight=0."
        )
    numbers = table.add(languages_in(dataset, args.mlc_languages))
    options = {
        "tokenizer": tokenizer,
        "anchor": args.mlc_anchor,
        "numbers": numbers,
        "max_length": args.mlc_max_length,
    }
    options["languages"] = args.mlc_languages
    if isinstance(dataset, IterableDataset):
        return dataset.map(_encode_row, fn_kwargs=options)
    processes = getattr(args, "dataset_num_proc", None)
    dataset = dataset.map(
        _encode_row, fn_kwargs=options, num_proc=processes, desc=f"Tokenizing parallel prompts of {name} dataset"
    )
    _report(dataset, args, name)
    return dataset.remove_columns(DROPPED)


def _encode_row(row: dict, tokenizer, anchor: str, numbers: dict[str, int], max_length: int, languages) -> dict:
    ids, kept, dropped = [], [], 0
    for language, prompt in prompt_group(row, anchor, languages).items():
        tokens = tokenize_prompt(tokenizer, prompt, row)
        if 0 < len(tokens) <= max_length:
            ids.append(tokens)
            kept.append(numbers[language])
        else:
            dropped += 1
    return {IDS: ids, LANGUAGES: kept, DROPPED: dropped}


def _report(dataset: Dataset, args, name: str) -> None:
    """Warn of prompts left out; refuse training data in which no row has anything to compare."""
    dropped = sum(dataset[DROPPED])
    if dropped:
        logger.warning(
            "%d prompts of the %s dataset are empty or longer than mlc_max_length=%d tokens and were left out of their "
            "groups (a truncated prompt would not end where the answer begins).",
            dropped,
            name,
            args.mlc_max_length,
        )
    if name == "train" and not any(len(languages) >= 2 for languages in dataset[LANGUAGES]):
        raise ValueError(
            f"No row of the training data has a prompt and at least one translation: column {COLUMN!r} is empty in "
            "every row, or all prompts were left out for their length."
        )
