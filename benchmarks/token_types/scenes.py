"""Pictures with captions: one to three small drawings of everyday things in a 2 x 2 grid, and what stands where.

    top left: red apple; bottom right: ferris wheel.

The drawings and names are real (Noto emoji); which of them stand together is drawn at random, so that a held-out scene is
new although each of its things was seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


PLACES = ("top left", "top right", "bottom left", "bottom right")
CELL, SIDE, PATCH = 32, 64, 8
N_PATCHES = (SIDE // PATCH) ** 2
NOTHING = -1


class Scenes:
    """A world of scenes.

    Args:
        folder: With `pictures.npy` (`uint8`, shape `(n, 32, 32, 3)`) and `names.json`.
        tokenizer: Of the language model.
        image_id, start_id, end_id (`int`): Ids of an image's placeholder, of the first token and of the last.
        n_names (`int`): How many of the things are used.
    """

    def __init__(self, folder: str, tokenizer: Any, image_id: int, start_id: int, end_id: int, n_names: int = 512):
        import numpy

        pictures = torch.from_numpy(numpy.load(Path(folder) / "pictures.npy"))
        names = json.loads((Path(folder) / "names.json").read_text(encoding="utf-8"))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:n_names]
        self.pictures = pictures[order].permute(0, 3, 1, 2).float() / 127.5 - 1
        self.image_id, self.start_id, self.end_id = image_id, start_id, end_id

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        self.names = [ids(" " + names[i]) for i in order.tolist()]
        self.places = [ids(f" {place}:") for place in PLACES]
        self.separator, self.stop = ids(";"), ids(".")

    def draw(self, n: int, generator: torch.Generator, at_least: int = 1) -> torch.Tensor:
        """Random scenes `(n, 4)`: index of the thing in each cell, or `NOTHING`."""
        things = torch.randint(len(self.names), (n, 4), generator=generator)
        count = torch.randint(at_least, 4, (n, 1), generator=generator)
        rank = torch.rand(n, 4, generator=generator).argsort(1)
        return torch.where(rank < count, things, NOTHING)

    def pixels(self, cells: torch.Tensor) -> torch.Tensor:
        """Pictures `(n, 3, 64, 64)` in [-1, 1], white where nothing is."""
        canvas = torch.ones(len(cells), 3, SIDE, SIDE)
        for place in range(4):
            rows = cells[:, place] != NOTHING
            y, x = CELL * (place // 2), CELL * (place % 2)
            canvas[rows, :, y : y + CELL, x : x + CELL] = self.pictures[cells[rows, place]]
        return canvas

    def caption(self, cells: list[int]) -> list[int]:
        """Token ids of a scene's caption, with the end."""
        found: list[int] = []
        for place, thing in enumerate(cells):
            if thing != NOTHING:
                found += (self.separator if found else []) + self.places[place] + self.names[thing]
        return [*found, *self.stop, self.end_id]

    def inputs(self, cells: torch.Tensor, captions: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
        """Arguments of the model, padded on the right; `captions` may be others than the scenes' own."""
        captions = [self.caption(row) for row in cells.tolist()] if captions is None else captions
        longest = max(len(caption) for caption in captions)
        head = [self.start_id] + [self.image_id] * N_PATCHES
        ids = torch.tensor([head + c + [self.end_id] * (longest - len(c)) for c in captions])
        mask = torch.tensor([[1] * (len(head) + len(c)) + [0] * (longest - len(c)) for c in captions])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": self.pixels(cells)}


HEAD = 1 + N_PATCHES  # tokens before the caption
