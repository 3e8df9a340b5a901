"""Inputs of the miniature: a random two-block model, two texts of a few words, and a few random pictures."""

from __future__ import annotations

import json
from pathlib import Path


NAMES = ["cat", "dog", "sun", "car", "key", "cup", "bee", "owl"]
CHARACTERS = 4096  # of each text; half of them to train on


def tiny_inputs(folder: Path) -> dict:
    """Write them to `folder`; returns where they are."""
    import numpy

    from tests.helpers.tiny_models import plant_outliers, plant_sink, tiny, tiny_tokenizer

    generator = numpy.random.default_rng(0)
    model = tiny("llama")
    plant_outliers(model, factor=8.0)
    plant_sink(model, factor=8.0)
    model.save_pretrained(folder / "source")
    tiny_tokenizer(bos=False).save_pretrained(folder / "source")
    pictures = folder / "pictures"
    pictures.mkdir()
    numpy.save(pictures / "pictures.npy", generator.integers(0, 256, (len(NAMES), 32, 32, 3), dtype=numpy.uint8))
    (pictures / "names.json").write_text(json.dumps(NAMES))
    texts = {}
    for name in ("handbook", "brown"):
        path = folder / f"{name}.txt"
        path.write_text(" ".join(generator.choice(NAMES, CHARACTERS // 3))[:CHARACTERS], encoding="utf-8")
        texts[name] = str(path)
    return {
        "source": str(folder / "source"),
        "texts": texts,
        "cuts": dict.fromkeys(texts, CHARACTERS // 2),
        "pictures": str(pictures),
    }
