"""Calibration rows with pictures: texts or chats beside the files of their pictures, made into inputs by the model's processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.image_utils import load_image


class Pictured(NamedTuple):
    """A text or chat, and the files of its pictures in the order of their places."""

    text: str | list
    images: list[Path]


def is_pictured(data: Any) -> bool:
    """Whether data as `read_data` returns it are rows with pictures."""
    return isinstance(data, list) and bool(data) and isinstance(data[0], Pictured)


def read_images(row: dict, folder: Path, where: str) -> list[Path]:
    """Files of a row's `images` (a list, or one name), looked for beside the file that holds the row.

    Raises:
        `ValueError`: for a name that is no file, and for what is no name.
    """
    names = row["images"] if isinstance(row["images"], list) else [row["images"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: 'images' must be a file's name or a list of them, got {row['images']!r}.")
    paths = [folder / name for name in names]
    for path in paths:
        if not os.path.isfile(path):  # whatever the name is like: too long, or with a zero byte
            raise ValueError(f"{where}: the picture {str(path)!r} is no file here.")
    return paths


def prepare(rows: list[Pictured], processor: Any, n_samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of `n_samples` of the rows, chosen at random, in their order; pictures of the others are not opened.

    Args:
        rows: At least `n_samples`.
        processor: The model's; a text has its own sign for a picture where one belongs, a chat a part `{"type": "image"}`.
        n_samples (`int`): How many rows.
        seed (`int`): Of the choice.

    Raises:
        `ValueError`: for too few rows, a tokenizer in the place of a processor, and rows that the processor refuses.
    """
    if len(rows) < n_samples:
        raise ValueError(
            f"Calibration needs n_samples={n_samples} rows, got {len(rows)}: give more, or lower n_samples."
        )
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            "The calibration rows have pictures, which a tokenizer cannot read: pass the model's processor, "
            "FreeActConfig(tokenizer=AutoProcessor.from_pretrained(...))."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_samples].sort().values
    return [_inputs(rows[index], processor) for index in order.tolist()]


def _inputs(row: Pictured, processor: Any) -> dict[str, torch.Tensor]:
    try:
        text = row.text if isinstance(row.text, str) else processor.apply_chat_template(row.text, tokenize=False)
        images = [load_image(str(path)).convert("RGB") for path in row.images]
        return dict(processor(images=images or None, text=[text], return_tensors="pt"))
    except Exception as error:  # a processor, its template and a picture's file are others' work
        raise ValueError(
            f"The processor refuses the calibration row that begins {str(row.text)[:60]!r}, with {len(row.images)} pictures "
            f"({type(error).__name__}: {error}). A text needs the processor's own sign for each picture."
        ) from error
