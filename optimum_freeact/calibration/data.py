"""Calibration data: from a name, a file, texts, chats or token ids to a tensor of token windows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from optimum_freeact.calibration.pictured import Pictured, is_pictured, prepare, read_images
from optimum_freeact.calibration.prepared import choose, is_prepared, read_prepared


KINDS = (
    "the path of a .txt or .jsonl file (with `images`, too), a list of strings or of chat messages, token ids of shape (n, length) or a list of "
    "tensors of them, a list of a processor's outputs, or a dataset name"
)


#: `owner/name` or `owner/name/config`, or one word; no path.
DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){0,2}")


def _read_file(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); calibration data may be {KINDS}.") from None
    except OSError as error:  # a failing read does not name its file
        raise ValueError(f"{path} cannot be read ({error}); calibration data may be {KINDS}.") from error
    if path.suffix not in (".jsonl", ".json"):
        return [text]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON: {error}. One JSON object a line is expected."
            ) from None
        images = None
        if isinstance(row, dict):
            images = read_images(row, path.parent, f"{path}, line {number}") if "images" in row else None
            row = row.get("text", row.get("messages"))
        if row is None:
            raise ValueError(f"{path}, line {number}, has neither a 'text' nor a 'messages' field.")
        rows.append(row if images is None else Pictured(row, images))
    return rows


def _read_dataset(name: str) -> list:
    """Texts or chats of a dataset on the hub, `owner/name` or `owner/name/config`; wikitext2 and c4 are short for two."""
    if (
        not DATASET_NAME.fullmatch(name) or Path(*name.split("/")[:2]).exists()
    ):  # `datasets` would search through a folder
        raise ValueError(f"dataset={name!r} is no file here, and cannot be a dataset's name; pass {KINDS}.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} is no file here; as the name of a dataset it needs `pip install datasets`. A path of a "
            ".txt or .jsonl file, a list of strings or token ids work without it."
        ) from error
    known: dict[str, tuple[str, str | None]] = {
        "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        "c4": ("allenai/c4", "en"),
    }
    owner, _, rest = name.partition("/")
    short, _, settings = rest.partition("/")
    path, config = known.get(name, (f"{owner}/{short}" if short else owner, settings or None))
    try:
        data = load_dataset(path, config, split="train", streaming=name == "c4")
    except Exception as error:
        raise ValueError(
            f"dataset={name!r} is neither a file here nor a dataset that could be loaded ({type(error).__name__}: "
            f"{error}). Give the path of a .txt or .jsonl file, a list of strings or of chat messages, or token ids."
        ) from error
    rows = [row for row, _ in zip(data, range(20_000))]
    columns = list(rows[0]) if rows else []  # a stream may not know its columns beforehand
    column = next((c for c in ("text", "messages", "content") if c in columns), None)
    if column is None and rows:
        raise ValueError(f"dataset={name!r} has columns {columns}; 'text' or 'messages' is needed.")
    return [row[column] for row in rows]


def _is_chat(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in item)


def _tokenize(items: list, tokenizer: Any) -> torch.Tensor:
    """All items as one stream of ids; texts are joined without special tokens, chats through the chat template."""
    stream: list[int] = []
    for item in items:
        text = item if isinstance(item, str) else _render(item, tokenizer)
        stream.extend(tokenizer(text, add_special_tokens=False).input_ids)
    return torch.tensor(stream, dtype=torch.long)


def _render(chat: list, tokenizer: Any) -> str:
    """A conversation through the tokenizer's chat template."""
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template is a program of the tokenizer's author
        raise ValueError(
            f"The tokenizer's chat template refuses a calibration chat that begins {str(chat)[:80]!r} "
            f"({type(error).__name__}: {error}). Give chats that it knows, or plain texts."
        ) from error


def _text_of(item: Any) -> str | list:
    """An item's text, or its chat messages."""
    if isinstance(item, dict):
        item = item.get("messages", item.get("text", item))
    if not isinstance(item, str) and not (_is_chat(item) and item):
        raise ValueError(
            f"A calibration item must be a string or a list of {{'role', 'content'}} messages, got {type(item).__name__}."
        )
    return item


def _stacked(items: list | tuple, seq_len: int) -> torch.Tensor:
    """Sequences of shape `(length,)` or `(n, length)`, cut to `seq_len`, as one tensor."""
    rows = [item[None] if item.ndim == 1 else item for item in items]
    for row in rows:
        if row.ndim != 2 or row.shape[1] < seq_len:
            raise ValueError(
                f"A tensor of token ids must have shape (length,) or (n, length) with at least seq_len={seq_len} tokens, got "
                f"{tuple(row.shape)}. Give longer ones, or lower seq_len."
            )
    return torch.cat([row[:, :seq_len] for row in rows])


def _too_short(n_samples: int, seq_len: int, found: str) -> ValueError:
    return ValueError(
        f"Calibration needs n_samples * seq_len = {n_samples} * {seq_len} = {n_samples * seq_len} tokens; the data {found}. "
        "Give more text, or lower n_samples or seq_len."
    )


def read_data(dataset: Any, n_samples: int, seq_len: int) -> torch.Tensor | list:
    """Calibration data as token ids or as a list of texts and chats, with all that can be checked without a model.

    Args:
        dataset: See [`FreeActConfig`]; what this function returned is returned again.
        n_samples, seq_len (`int`): How many windows of how many tokens will be cut from it.

    Raises:
        `ValueError`: for no data, data of another kind, or too little of it (says how many tokens are needed).
    """
    if dataset is None:
        raise ValueError(f"Quantizing needs calibration data: pass FreeActConfig(dataset=...) with {KINDS}.")
    if isinstance(dataset, torch.Tensor):
        if dataset.ndim != 2 or dataset.is_floating_point() or dataset.dtype == torch.bool:
            raise ValueError(
                f"Token ids must be an integer tensor of shape (n, length), got {dataset.dtype} of {tuple(dataset.shape)}."
            )
        if dataset.shape[1] < seq_len:
            raise ValueError(
                f"Token ids have length {dataset.shape[1]}; seq_len={seq_len} is asked for. Lower seq_len."
            )
        if len(dataset) < n_samples:
            raise _too_short(n_samples, seq_len, f"has {len(dataset)} rows")
        return dataset
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(item, torch.Tensor) for item in dataset):
        return read_data(_stacked(dataset, seq_len), n_samples, seq_len)
    if is_prepared(dataset):
        return read_prepared(dataset, n_samples)
    if isinstance(dataset, (str, Path)):
        path = Path(dataset)
        if path.is_dir() or (path.suffix in (".txt", ".jsonl", ".json") and not path.is_file()):
            raise ValueError(
                f"dataset={str(dataset)!r} is {'a folder' if path.is_dir() else 'no file here'}; pass {KINDS}."
            )
        dataset = _read_file(path) if path.is_file() else _read_dataset(str(dataset))
    if isinstance(dataset, (dict, bytes)) or not hasattr(dataset, "__iter__"):
        raise ValueError(f"dataset must be {KINDS}, got {type(dataset).__name__}.")
    items = list(dataset)
    if items and all(isinstance(m, dict) and "role" in m for m in items):
        items = [items]  # one conversation
    if any(isinstance(item, Pictured) for item in items):
        rows = [item if isinstance(item, Pictured) else Pictured(item, []) for item in items]
        return [row._replace(text=_text_of(row.text)) for row in rows]
    items = [_text_of(item) for item in items]
    if not any(items):
        raise _too_short(n_samples, seq_len, "is empty")
    if all(isinstance(item, str) for item in items):  # no tokenizer makes more tokens than bytes, but for a prefix
        most = sum(len(item.encode("utf-8")) + 1 for item in items)
        if most < n_samples * seq_len:
            raise _too_short(n_samples, seq_len, f"has {most - len(items)} bytes of text")
    return items


def load_samples(
    dataset: Any, tokenizer: Any, n_samples: int, seq_len: int, seed: int, vocab_size: int | None = None
) -> torch.Tensor | list[dict]:
    """Token windows for calibration; prepared inputs are only chosen from.

    Args:
        dataset: See [`FreeActConfig`]; windows of text are cut without overlap and chosen at random.
        tokenizer: Needed for text and chats; where rows have pictures, the model's processor.
        n_samples, seq_len (`int`): How many windows of how many tokens.
        seed (`int`): Of the choice.
        vocab_size (`int`, *optional*): Largest allowed id + 1.

    Returns:
        `torch.Tensor` of shape `(n_samples, seq_len)`, `int64`.

    Raises:
        `ValueError`: as [`read_data`], and for text without a tokenizer or ids out of range.
    """
    data = read_data(dataset, n_samples, seq_len)
    if is_pictured(data):
        data = prepare(data, tokenizer, n_samples, seed)
    if is_prepared(data):
        return choose(data, n_samples, seed, vocab_size)
    if isinstance(data, torch.Tensor):
        windows = data.long()[:, :seq_len]
    else:
        if tokenizer is None:
            raise ValueError("Calibration on text needs a tokenizer: pass FreeActConfig(tokenizer=...).")
        stream = _tokenize(data, tokenizer)
        windows = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
        if len(windows) < n_samples:
            raise _too_short(n_samples, seq_len, f"has {len(stream)}")
    if vocab_size is not None and not 0 <= int(windows.min()) <= int(windows.max()) < vocab_size:
        raise ValueError(
            f"Calibration ids must lie in [0, {vocab_size}), got {int(windows.min())}..{int(windows.max())}."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:n_samples].sort().values]
