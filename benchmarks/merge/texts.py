"""Text to calibrate, adapt and score on: standard libraries split by file, and a French handbook split by place."""

import json
import random
import sysconfig
from pathlib import Path

import torch


SKIPPED = ("test", "site-packages", "idlelib", "encodings", "lib2to3", "turtledemo")
CHUNK, STEP, PER_FILE = 1200, 1200, 10
#: Characters of joined paragraphs that make one French text.
FRENCH = 700


def code_chunks(seed: int = 0) -> dict[str, list[str]]:
    """Lists of pieces of about 1200 characters: `calibration`, `train`, `valid` and `eval`, each from files of its own."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not any(part in str(path.relative_to(root)) for part in SKIPPED)
    )
    draw = random.Random(seed)
    draw.shuffle(files)
    return _split([path.read_text(encoding="utf-8", errors="ignore") for path in files], draw)


def library_chunks(asset: str, seed: int = 0) -> dict[str, list[str]]:
    """The same four lists from another language's standard library, see `tools/assets.py`."""
    from tools.assets import fetch

    lines = (fetch(asset) / "files.jsonl").read_text(encoding="utf-8").split("\n")
    files, draw = [json.loads(line)["text"] for line in lines if line], random.Random(seed)
    draw.shuffle(files)
    return _split(files, draw)


def _split(files: list[str], draw: random.Random) -> dict[str, list[str]]:
    third = len(files) // 3
    cuts = {"calibration": files[:third], "train": files[third:-90], "valid": files[-90:-60], "eval": files[-60:]}
    chunks = {}
    for name, texts in cuts.items():
        pieces = []
        for text in texts:
            text = text[: PER_FILE * STEP]
            pieces += [text[i : i + CHUNK] for i in range(0, len(text) - CHUNK, STEP)]
        draw.shuffle(pieces)
        chunks[name] = pieces
    return chunks


def french_chunks(seed: int = 0) -> dict[str, list[str]]:
    """The same four lists from the handbook's French edition: consecutive paragraphs joined, four stretches of the book."""
    from tools.assets import fetch

    paragraphs = (fetch("handbook-fr") / "text.txt").read_text(encoding="utf-8").splitlines()
    texts, joined = [], ""
    for paragraph in paragraphs:
        joined = f"{joined}\n{paragraph}" if joined else paragraph
        if len(joined) >= FRENCH:
            texts.append(joined)
            joined = ""
    cuts = [round(len(texts) * share) for share in (0.0, 0.4, 0.75, 0.85, 1.0)]
    draw, chunks = random.Random(seed), {}
    for name, start, end in zip(("calibration", "train", "valid", "eval"), cuts, cuts[1:]):
        chunks[name] = texts[start:end]
        draw.shuffle(chunks[name])
    return chunks


def padded(rows: list, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(n, length)` and labels of their successors, -100 where there is none."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        labels[i, : len(row) - 1] = torch.as_tensor(row)[1:]
    return ids.to(device), labels.to(device)
