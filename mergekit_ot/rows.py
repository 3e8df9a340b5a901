"""Matched activation rows on disk, one file per site and depth, so that planning holds one pair of blocks at a time.

Layout of a store: `meta.json` and raw arrays `stream.<depth>`, `<site>.<layer>` and `tokens`. Depth `2 l` is the
stream entering layer `l`, `2 l + 1` the stream between its attention and its MLP, `2 L` the stream leaving the last
layer. Rows are appended batch by batch; `meta.json` is replaced after each batch, so an interrupted capture resumes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch


SITES = ("q", "k", "v", "o_in", "h")
FORMAT_VERSION = 1


class RowStore:
    """Append-only store of activation rows of one model.

    Args:
        folder (`str | Path`): created when missing.
        key (`str`): hash of everything the rows depend on; a store with another key is emptied.
        dtype (`str`, *optional*, defaults to `"float16"`): storage of the block sites; the stream is float32.
    """

    def __init__(self, folder: str | Path, key: str, dtype: str = "float16"):
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.meta: dict = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "dtype": dtype,
            "batches": 0,
            "rows": 0,
            "widths": {},
        }
        path = self.folder / "meta.json"
        if path.exists():
            found = json.loads(path.read_text())
            if found["key"] == key and found["format_version"] == FORMAT_VERSION and found["dtype"] == dtype:
                self.meta = found
            else:
                for old in self.folder.iterdir():
                    old.unlink()
        self._truncate()

    @property
    def batches(self) -> int:
        """Batches that are completely written."""
        return self.meta["batches"]

    @property
    def rows(self) -> int:
        """Rows that are completely written."""
        return self.meta["rows"]

    def _kind(self, name: str) -> np.dtype:
        if name == "tokens":
            return np.dtype("int64")
        return np.dtype("float32") if name.startswith("stream.") else self.dtype

    def _truncate(self) -> None:
        """Drop rows of a batch that was interrupted."""
        for name, width in self.meta["widths"].items():
            size = self.rows * width * self._kind(name).itemsize
            with (self.folder / name).open("r+b") as handle:
                handle.truncate(size)
        for path in self.folder.iterdir():
            if path.name != "meta.json" and path.name not in self.meta["widths"]:
                path.unlink()

    def append(self, name: str, values: torch.Tensor) -> None:
        """Append rows `(n, width)` to one array; they count only after `commit`."""
        kind = self._kind(name)
        array = values.detach().cpu().to(torch.int64 if name == "tokens" else torch.float32).numpy()
        if kind == np.float16:
            array = array.clip(-65504, 65504)
        with (self.folder / name).open("ab") as handle:
            handle.write(np.ascontiguousarray(array, dtype=kind).tobytes())
        self.meta.setdefault("pending", {})[name] = int(np.prod(array.shape[1:], dtype=int))

    def commit(self, n_rows: int) -> None:
        """Count the batch appended last."""
        self.meta["widths"].update(self.meta.pop("pending", {}))
        self.meta["batches"] += 1
        self.meta["rows"] += n_rows
        scratch = self.folder / "meta.json.tmp"
        scratch.write_text(json.dumps(self.meta))
        os.replace(scratch, self.folder / "meta.json")

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """All rows of one array, `(rows, width)` in float32 (`tokens`: `(rows,)` in int64).

        Raises:
            `KeyError`: when this store has no such array.
        """
        if name not in self.meta["widths"]:
            raise KeyError(f"{self.folder} holds no rows named {name!r}; it holds {len(self.meta['widths'])} arrays.")
        array = np.fromfile(self.folder / name, dtype=self._kind(name))
        values = torch.from_numpy(array)
        if name == "tokens":
            return values
        return values.reshape(self.rows, -1).to(device).float()

    def bytes(self) -> int:
        """Size of the store on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())
