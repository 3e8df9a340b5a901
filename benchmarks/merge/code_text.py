"""Code to calibrate, adapt and score on: the standard library of the running Python, split by file."""

import random
import sysconfig
from pathlib import Path


SKIPPED = ("test", "site-packages", "idlelib", "encodings", "lib2to3", "turtledemo")
CHUNK, STEP, PER_FILE = 1200, 1200, 10


def code_chunks(seed: int = 0) -> dict[str, list[str]]:
    """Disjoint lists of pieces of about 1200 characters: `calibration`, `train` and `eval`, from different files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not any(part in str(path.relative_to(root)) for part in SKIPPED)
    )
    draw = random.Random(seed)
    draw.shuffle(files)
    cuts = {"calibration": files[: len(files) // 3], "train": files[len(files) // 3 : -60], "eval": files[-60:]}
    chunks = {}
    for name, paths in cuts.items():
        pieces = []
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore")[: PER_FILE * STEP]
            pieces += [text[i : i + CHUNK] for i in range(0, len(text) - CHUNK, STEP)]
        draw.shuffle(pieces)
        chunks[name] = pieces
    return chunks
