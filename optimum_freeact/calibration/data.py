"""Calibration data: from a name, a file, texts, chats or token ids to a tensor of token windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def _read_file(path: Path) -> list:
    if path.suffix not in (".jsonl", ".json"):
        return [path.read_text(encoding="utf-8")]
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON: {error}. One JSON object a line is expected."
            ) from None
        if isinstance(row, dict):
            row = row.get("text", row.get("messages"))
        if row is None:
            raise ValueError(f"{path}, line {number}, has neither a 'text' nor a 'messages' field.")
        rows.append(row)
    return rows


def _read_dataset(name: str) -> list:
    """Texts of a dataset on the hub, `name` or `name/config`; wikitext2 and c4 are short for the usual ones."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} is no file here; as the name of a dataset it needs `pip install datasets`. A path of a "
            ".txt or .jsonl file, a list of strings or token ids work without it."
        ) from error
    known = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}
    path, config = known.get(name, (name, None))
    try:
        data = load_dataset(path, config, split="train", streaming=name == "c4")
    except Exception as error:
        raise ValueError(
            f"dataset={name!r} is neither a file here nor a dataset that could be loaded ({type(error).__name__}: "
            f"{error}). Give the path of a .txt or .jsonl file, a list of strings or of chat messages, or token ids."
        ) from error
    column = next((c for c in ("text", "messages", "content") if c in (data.column_names or [])), None)
    if column is None:
        raise ValueError(f"dataset={name!r} has columns {data.column_names}; 'text' or 'messages' is needed.")
    return [row[column] for row, _ in zip(data, range(20_000))]


def _is_chat(item: Any) -> bool:
    return isinstance(item, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in item)


def _tokenize(items: list, tokenizer: Any) -> torch.Tensor:
    """All items as one stream of ids; texts are joined without special tokens, chats through the chat template."""
    stream: list[int] = []
    for item in items:
        if isinstance(item, dict) and "messages" in item:
            item = item["messages"]
        if isinstance(item, dict) and "text" in item:
            item = item["text"]
        if isinstance(item, str):
            stream.extend(tokenizer(item, add_special_tokens=False).input_ids)
        elif _is_chat(item):
            stream.extend(
                tokenizer(tokenizer.apply_chat_template(item, tokenize=False), add_special_tokens=False).input_ids
            )
        else:
            raise ValueError(
                f"A calibration item must be a string or a list of {{'role', 'content'}} messages, got {type(item).__name__}."
            )
    return torch.tensor(stream, dtype=torch.long)


def load_samples(
    dataset: Any, tokenizer: Any, n_samples: int, seq_len: int, seed: int, vocab_size: int | None = None
) -> torch.Tensor:
    """Token windows for calibration.

    Args:
        dataset: See [`FreeActConfig`]; windows of text are cut without overlap and chosen at random.
        tokenizer: Needed for text and chats.
        n_samples, seq_len (`int`): How many windows of how many tokens.
        seed (`int`): Of the choice.
        vocab_size (`int`, *optional*): Largest allowed id + 1.

    Returns:
        `torch.Tensor` of shape `(n_samples, seq_len)`, `int64`.

    Raises:
        `ValueError`: for no data, data of another kind, too little text (says how many tokens are needed), or ids out
        of range.
    """
    if dataset is None:
        raise ValueError(
            "Quantizing needs calibration data: pass FreeActConfig(dataset=...) with the path of a .txt or .jsonl file, "
            "a list of strings or of chat messages, token ids, or a dataset name."
        )
    if isinstance(dataset, (str, Path)):
        path = Path(dataset)
        dataset = _read_file(path) if path.is_file() else _read_dataset(str(dataset))
    if isinstance(dataset, torch.Tensor):
        if dataset.ndim != 2 or dataset.is_floating_point():
            raise ValueError(f"Token ids must be an integer tensor of shape (n, length), got {tuple(dataset.shape)}.")
        windows = dataset.long()[:, :seq_len]
        if windows.shape[1] < seq_len:
            raise ValueError(
                f"Token ids have length {windows.shape[1]}; seq_len={seq_len} is asked for. Lower seq_len."
            )
    else:
        items = list(dataset)
        if not items:
            raise ValueError("The calibration data is empty.")
        if tokenizer is None:
            raise ValueError("Calibration on text needs a tokenizer: pass FreeActConfig(tokenizer=...).")
        stream = _tokenize(items, tokenizer)
        windows = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
    if len(windows) < n_samples:
        raise ValueError(
            f"Calibration needs n_samples * seq_len = {n_samples} * {seq_len} = {n_samples * seq_len} tokens; the data "
            f"has {windows.numel()} in whole windows. Give more text, or lower n_samples or seq_len."
        )
    if vocab_size is not None and windows.numel() and not 0 <= int(windows.min()) <= int(windows.max()) < vocab_size:
        raise ValueError(
            f"Calibration ids must lie in [0, {vocab_size}), got {int(windows.min())}..{int(windows.max())}."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:n_samples].sort().values]
