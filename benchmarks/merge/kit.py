"""The texts of `adaptation.py`, once per pair, in both tokenizations, with the plan between the vocabularies.

    python benchmarks/merge/kit.py --out kit                        # on the CPU, in seconds

A kit is a folder of a few megabytes. It fixes the texts: those in Python are this Python's standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarks.merge.texts import code_chunks, french_chunks, library_chunks  # noqa: E402
from mergekit_ot.anchors import MatchedText, match_text  # noqa: E402
from mergekit_ot.bundle import PlanBundle  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.planning import open_pair, record_pair  # noqa: E402
from mergekit_ot.settings import PlanSettings  # noqa: E402
from mergekit_ot.solve import rows_needed, solve_pair  # noqa: E402
from mergekit_ot.spelling import Spelling, spell  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from tools.assets import fetch  # noqa: E402


@dataclass(frozen=True)
class Task:
    """A pair on a text: donor asset, and what it knows better than SmolLM2-135M."""

    donor: str
    chunks: Callable[[int], dict[str, list[str]]]


TASKS = {
    "rust": Task("qwen2.5", partial(library_chunks, "rust-std")),
    "french": Task("gemma3-270m", french_chunks),
    "python": Task("qwen2.5", code_chunks),
    "go": Task("qwen2.5", partial(library_chunks, "go-std")),
}
TARGET = "smollm2"
#: Target tokens kept of a text.
LENGTH = 160


@dataclass
class Kit:
    """Texts as both models see them; every seed adapts on a part of `train`."""

    calibration: list[MatchedText]
    train: list[MatchedText]
    valid: list[list[int]]
    scored: list[list[int]]
    spelling: Spelling
    folder: Path
    task: str


def match_all(task: str, options: argparse.Namespace) -> Kit:
    """Choose and tokenize the texts of a task."""
    target, donor = fetch(TARGET), fetch(TASKS[task].donor)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (target, donor)]
    pair, chunks = open_pair(str(target), str(donor)), TASKS[task].chunks(0)
    wanted, calibration = 2 * rows_needed(pair.target, pair.donor), []
    for text in chunks["calibration"]:
        calibration.append(match_text(text, *tokenizers, max_length=128))
        if sum(len(one.target_rows) for one in calibration) >= wanted:
            break
    pieces = chunks["train"][: options.texts]
    train = [match_text(text, *tokenizers, max_length=options.length, skip=0) for text in pieces]

    def ids(name: str, count: int) -> list[list[int]]:
        coded = tokenizers[0](chunks[name][:count], truncation=True, max_length=options.length)["input_ids"]
        return [list(row) for row in coded]

    spelling = spell(*tokenizers, pair.donor.vocab_size)
    return Kit(calibration, train, ids("valid", options.valid), ids("eval", options.scored), spelling, Path(), task)


def save_kit(kit: Kit, folder: Path, donor: Path) -> None:
    """Write everything but what a donor's weights say."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "donor").mkdir(exist_ok=True)
    shutil.copy(donor / "config.json", folder / "donor" / "config.json")
    texts = {
        "calibration": [asdict(text) for text in kit.calibration],
        "train": [asdict(text) for text in kit.train],
        "valid": kit.valid,
        "scored": kit.scored,
    }
    (folder / "texts.json").write_text(json.dumps(texts))
    pieces = kit.spelling.pieces
    flat, counts = torch.tensor([i for row in pieces for i in row]), torch.tensor([len(row) for row in pieces])
    save_file({"pieces": flat.int(), "counts": counts.int()}, folder / "spelling.safetensors")


def load_kit(folder: Path) -> Kit:
    """Read a kit."""
    texts = json.loads((folder / "texts.json").read_text())
    calibration, train = ([MatchedText(**text) for text in texts[name]] for name in ("calibration", "train"))
    spelled = load_file(folder / "spelling.safetensors")
    rows = torch.split(spelled["pieces"], spelled["counts"].tolist())
    spelling = Spelling(tuple(tuple(row.tolist()) for row in rows))
    return Kit(calibration, train, texts["valid"], texts["scored"], spelling, folder, folder.name)


def digest(kit: Kit) -> str:
    """Which texts these are."""
    return hashlib.sha256((kit.folder / "texts.json").read_bytes()).hexdigest()[:16]


#: Plans of stream and attention, the blocks the paper merges.
ATTENTION = PlanSettings(residual_map="procrustes", modules=("attn",))


def plans_of(
    kit: Kit, target: Path, donor: Path, device: str, settings: PlanSettings = ATTENTION
) -> tuple[PlanBundle, Transporter]:
    """Plans of a pair on the kit's calibration text."""
    pair = open_pair(str(target), str(donor))
    with tempfile.TemporaryDirectory() as scratch:
        stores = record_pair(pair, kit.calibration, Path(scratch), "kit", device=device, quiet=True)
        readers = CheckpointReader(target), CheckpointReader(donor)
        bundle = solve_pair(*stores, pair.target, pair.donor, settings, *readers, device=device, quiet=True)
    return bundle, Transporter(bundle, pair.target, pair.donor, *readers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("kit"))
    for name, default in (("texts", 256), ("valid", 48), ("scored", 96), ("length", LENGTH)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for task in options.tasks:
        start, folder, donor = time.perf_counter(), options.out / task, fetch(TASKS[task].donor)
        save_kit(match_all(task, options), folder, donor)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
