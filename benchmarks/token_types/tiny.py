"""Inputs of the miniature: a random two-block model, two texts drawn from it, and a few random pictures."""

from __future__ import annotations

import json
from pathlib import Path


def tiny_inputs(folder: Path) -> dict:
    """Write them to `folder`; returns where they are."""
    import numpy

    from benchmarks.accuracy.run import tiny_world

    models, texts = tiny_world(folder)
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = numpy.random.default_rng(0)
    numpy.save(pictures / "pictures.npy", generator.integers(0, 256, (8, 32, 32, 3), dtype=numpy.uint8))
    (pictures / "names.json").write_text(json.dumps(["cat", "dog", "sun", "car", "key", "cup", "bee", "owl"]))
    return {
        "source": models["tiny"],
        "texts": {text.name: text.path for text in texts},
        "cuts": {text.name: text.evaluation for text in texts},
        "pictures": str(pictures),
    }
