"""The rows that a command works on, from a file, a folder or the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trl_mlc.command_options import DataOptions, TrainOptions


#: Endings of files with rows, and what `datasets` calls them.
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(options: DataOptions):
    """Rows as the options describe them, as a `datasets.Dataset`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from trl_mlc.parallel import from_flat_columns

    if not options.dataset_name.strip():
        raise ValueError("Name the rows with --dataset_name: a file, a folder or a hub dataset.")
    path = Path(options.dataset_name)
    kind = KINDS.get(path.suffix)
    if kind is None and path.is_file():
        raise ValueError(f"{path} ends in {path.suffix!r}; rows are read from files that end in one of {list(KINDS)}.")
    if (
        kind is not None and not path.is_file() and not set("*?[:") & set(options.dataset_name)
    ):  # a pattern, an address
        raise ValueError(f"There is no file {path}; --dataset_name takes a file, a folder or a hub dataset.")
    try:
        if kind is not None:
            data = load_dataset(kind, data_files=str(path), split=options.dataset_split)
        else:
            data = load_dataset(options.dataset_name, name=options.dataset_config, split=options.dataset_split)
    except DatasetGenerationError as error:  # what is wrong stands in its cause
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    except StopIteration:  # what `datasets` makes of an empty file
        data = ()
    if len(data) == 0:
        raise ValueError(f"{options.dataset_name} has no rows in split {options.dataset_split!r}.")
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}.")
        data = data.select(range(min(options.limit, len(data))))
    return data if options.flat_prefix is None else from_flat_columns(data, options.flat_prefix)


def load_eval_rows(options: TrainOptions):
    """Rows for evaluation during training."""
    split = options.eval_dataset_split or ("test" if options.eval_dataset_name is None else "train")
    name = options.dataset_name if options.eval_dataset_name is None else options.eval_dataset_name
    try:
        return load_rows(replace(options, dataset_name=name, dataset_split=split, limit=None))
    except ValueError as error:
        raise ValueError(
            f"No rows for evaluation: {error} Name some with --eval_dataset_name and --eval_dataset_split, or leave "
            "eval_strategy at 'no'."
        ) from error
