"""Hashes of content: of a file, of a checkpoint, of plain JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_hash(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def model_hash(folder: str | Path) -> str:
    """Hash of a checkpoint's content: config, weights and tokenizer, by file name and sha256."""
    names = [
        path for pattern in ("config.json", "*.safetensors", "tokenizer.json") for path in Path(folder).glob(pattern)
    ]
    return content_key({path.name: file_hash(path) for path in names})


def content_key(value: dict) -> str:
    """Hash of plain JSON, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
