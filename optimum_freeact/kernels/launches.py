"""How the Triton kernels are launched, by number of rows: measured on one H100 with `benchmarks/speed/tune.py`.

`FREEACT_LAUNCHES` names a JSON file with other settings, for tuning and for other GPUs: an object with some of the keys of
[`DEFAULTS`], each a list of `[largest number of rows or null, settings]`; settings that are left out stay as they are.
"""

from __future__ import annotations

import json
import os
from functools import cache

import torch

from optimum_freeact.kernels.triton_state import INTERPRETED


# Per kernel: (rows at most, settings). Rounding: `rows` x `chunk` numbers at a time of a program of the projection, at most
# `parts` programs for the same rows and about `fill` in all; `correct_rows` x `elements` of a program that corrects;
# `programs` that finish, `finish_rows` at a time. Products: BM rows of codes, BN outputs, BK bytes, GROUP
# blocks of outputs in a row; what the weight brings to the end is asked for `early`, before the codes, or after them. Stream: `room` bytes of shared memory for pieces of the weight, `depth` of them under way at a
# time; outputs are not shared by programs where there is a block of them for at least `whole` of the multiprocessors. Rounding in one pass, on
# Hopper by the columns of a tile: `workers` of a program, each with `deep` rows on their way; the next one is asked for `soon`, after
# the first product; means are read a row `ahead`; what follows is let start `early`. By Triton: rows are read a row `ahead`, and so are
# means (`mean_ahead`), which pays where the kernel starts before its rows are there; so many programs `ask` for the means of all types before
# any row's type is known. `pdl`: programmatic dependent launch.
DEFAULTS: dict[str, list[tuple[int | None, dict]]] = {
    "round": [
        (4, {"rows": 16, "chunk": 512, "parts": 64, "fill": 264, "project_warps": 8, "correct_rows": 16, "elements": 1,
             "correct_warps": 4, "programs": 132, "finish_rows": 1, "finish_warps": 4, "pdl": True}),
        (64, {"rows": 16, "chunk": 256, "parts": 64, "fill": 264, "project_warps": 4, "correct_rows": 16, "elements": 1,
              "correct_warps": 4, "programs": 132, "finish_rows": 1, "finish_warps": 4, "pdl": True}),
        (None, {"rows": 64, "chunk": 128, "parts": 4, "fill": 128, "project_warps": 4, "correct_rows": 64, "elements": 256,
                "correct_warps": 4, "programs": 792, "finish_rows": 2, "finish_warps": 4, "pdl": False}),
    ],
    "pass": [
        (16, {"programs": 264, "warps": 8, "stages": 1, "ahead": False, "mean_ahead": False, "ask": 0, "registers": 128, "pdl": True}),
        (None, {"programs": 264, "warps": 8, "stages": 1, "ahead": False, "mean_ahead": False, "ask": 0, "registers": 128, "pdl": False}),
    ],
    "pass_2048": [
        (16, {"programs": 264, "warps": 8, "stages": 1, "ahead": False, "mean_ahead": True, "ask": 0, "registers": 128, "pdl": True}),
        (None, {"programs": 1056, "warps": 1, "stages": 1, "ahead": False, "mean_ahead": False, "ask": 4, "registers": 192, "pdl": False}),
    ],
    "pass_1024": [
        (16, {"programs": 264, "warps": 8, "stages": 1, "ahead": False, "mean_ahead": True, "ask": 0, "registers": 128, "pdl": True}),
        (None, {"programs": 2112, "warps": 1, "stages": 1, "ahead": False, "mean_ahead": False, "ask": 4, "registers": 128, "pdl": False}),
    ],
    "pass_hopper_64": [
        (64, {"registers": 80, "workers": 1, "deep": 1, "soon": False, "ahead": False, "early": False, "pdl": True}),
        (None, {"registers": 96, "workers": 1, "deep": 2, "soon": False, "ahead": True, "early": False, "pdl": False}),
    ],
    "pass_hopper_128": [
        (64, {"registers": 128, "workers": 1, "deep": 1, "soon": False, "ahead": False, "early": False, "pdl": True}),
        (264, {"registers": 128, "workers": 1, "deep": 1, "soon": False, "ahead": False, "early": False, "pdl": False}),
        (None, {"registers": 128, "workers": 2, "deep": 2, "soon": True, "ahead": True, "early": False, "pdl": False}),
    ],
    "dp4a": [
        (1, {"words": 2048, "warps": 4, "pdl": True}),
        (None, {"words": 2048, "warps": 2, "pdl": True}),
    ],
    "stream": [
        (8, {"BM": 8, "room": 172_000, "depth": 4, "whole": 0.8, "registers": 104, "pdl": True}),
        (16, {"BM": 16, "room": 172_000, "depth": 4, "whole": 0.8, "registers": 104, "pdl": True}),
        (None, {"BM": 32, "room": 172_000, "depth": 4, "whole": 0.8, "registers": 128, "pdl": True}),
    ],
    "w4": [
        (16, {"BM": 16, "BN": 64, "BK": 128, "GROUP": 1, "warps": 4, "stages": 4, "early": True, "registers": None, "pdl": True}),
        (64, {"BM": 64, "BN": 64, "BK": 128, "GROUP": 1, "warps": 4, "stages": 4, "early": True, "registers": None, "pdl": True}),
        (None, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "warps": 4, "stages": 4, "early": False, "registers": None, "pdl": False}),
    ],
    "w4_small": [
        (None, {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "warps": 4, "stages": 4, "early": False, "registers": 128, "pdl": False}),
    ],
    "gemv": [
        (None, {"bytes": 16384, "warps": 4, "pdl": True}),
    ],
    "w8": [
        (16, {"BM": 16, "BN": 64, "BK": 128, "warps": 4, "stages": 4}),
        (None, {"BM": 64, "BN": 64, "BK": 128, "warps": 4, "stages": 3}),
    ],
    "w8_row": [
        (None, {"words": 8192, "warps": 8, "pdl": True}),
    ],
    "groups": [
        (16, {"BM": 16, "BN": 64, "BK": 256, "GROUP": 1, "warps": 4, "stages": 3, "early": True, "registers": None, "pdl": True}),
        (64, {"BM": 64, "BN": 64, "BK": 128, "GROUP": 1, "warps": 4, "stages": 3, "early": True, "registers": None, "pdl": True}),
        (None, {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "warps": 4, "stages": 3, "early": False, "registers": None, "pdl": False}),
    ],
    "groups_small": [
        (None, {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "warps": 4, "stages": 3, "early": False, "registers": 128, "pdl": False}),
    ],
}  # fmt: skip


ENVIRONMENT = "FREEACT_LAUNCHES"


@cache
def _settings() -> dict[str, list[tuple[int | None, dict]]]:
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return DEFAULTS
    given = _read(path)
    return {**DEFAULTS, **{name: _filled(name, entries) for name, entries in given.items()}}


def check_launches() -> None:
    """Read `FREEACT_LAUNCHES`, so that what is wrong there is said before any kernel runs.

    Raises:
        `ValueError`: if the file is not there, is no JSON, or names kernels or settings that are not known.
    """
    _settings()


def _read(path: str) -> dict[str, list]:
    """What a file of settings says, checked."""
    told = f"{ENVIRONMENT}={path!r}"
    try:
        with open(path, encoding="utf-8") as file:
            given = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{told} cannot be read as JSON ({error}). Correct it, or unset it.") from error
    form = 'an object like {"w4": [[64, {"stages": 3}], [null, {"stages": 4}]]}: settings up to so many rows, null for any number'
    if not isinstance(given, dict):
        raise ValueError(f"{told} must hold {form}; got {type(given).__name__}.")
    for name, entries in given.items():
        if name not in DEFAULTS:
            raise ValueError(f"{told} names the kernel {name!r}; known are {sorted(DEFAULTS)}.")
        if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
            raise ValueError(f"{told} must hold {form}; got {str(entries)[:100]} for {name!r}.")
        known = {setting for _, settings in DEFAULTS[name] for setting in settings}
        unknown = sorted({setting for _, settings in entries for setting in settings} - known)
        if unknown:
            raise ValueError(f"{told} names the settings {unknown} of {name!r}; known are {sorted(known)}.")
    return given


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    most, settings = entry
    return (most is None or type(most) is int) and isinstance(settings, dict)


def _filled(name: str, entries: list) -> list[tuple[int | None, dict]]:
    named = [most for most, _ in entries]
    kept = [(most, settings) for most, settings in DEFAULTS[name] if most not in named]
    changed = [(most, {**_find(DEFAULTS[name], most or 1 << 62), **settings}) for most, settings in entries]
    return sorted(kept + changed, key=lambda entry: entry[0] or 1 << 62)


def _find(entries: list[tuple[int | None, dict]], n: int) -> dict:
    return next(settings for most, settings in entries if most is None or n <= most)


def round_launch(n: int, d: int, changes: dict) -> dict:
    """Settings to round `n` rows of `d` numbers; `changes` override."""
    found = {**_find(_settings()["round"], n), **changes}
    blocks = -(-n // found["rows"])  # of rows; each is cut into so many parts that the GPU is full
    parts = max(1, min(found["parts"], -(-d // found["chunk"]), -(-found["fill"] // blocks)))
    return {**found, "steps": -(-d // (found["chunk"] * parts))}


def pass_launch(n: int, tile: int, changes: dict) -> dict:
    """Settings to round `n` rows, each a padded tile of so many numbers, in one pass; `changes` override. One warp rounds a row of a small
    tile, since all warps of a program execute nearly the same few hundred instructions.
    """
    name = "pass_1024" if tile <= 1024 else "pass_2048" if tile <= 2048 else "pass"
    return {**_find(_settings()[name], n), **changes}


def pass_hopper_launch(n: int, threads: int, columns: int, changes: dict) -> dict:
    """The same for Hopper's kernel, by the columns of its tiles; as many programs of workers of so many threads on a
    multiprocessor as its registers allow.
    """
    found = {**_find(_settings()[f"pass_hopper_{columns}"], n), **changes}
    return {"per_processor": max(1, 65536 // (found["registers"] * threads * found["workers"])), **found}


def dp4a_launch(n: int, wide: int) -> dict:
    """Settings of a product on plain cores; `wide` is the padded number of words of a row."""
    found = dict(_find(_settings()["dp4a"], n))
    return {"BN": max(1, min(16, found.pop("words") // wide)), **found}


def stream_launch(n: int, changes: dict) -> dict:
    """Settings of a product whose weights come as a stream, for `n` rows; `changes` override."""
    return {**_find(_settings()["stream"], n), **changes}


def gemv_launch(n: int, wide: int) -> dict:
    """Settings of a product with groups on plain cores; `wide` is the padded number of bytes of a row."""
    found = dict(_find(_settings()["gemv"], n))
    return {"BN": max(1, min(16, found.pop("bytes") // wide)), **found}


# Below so many blocks of many rows smaller ones are taken: large ones would leave multiprocessors without one, and what follows a
# product, whose way nothing hides but other blocks, would count
SMALL_BLOCKS = 400


def w4_launch(n: int, m: int, half: int, name: str = "w4") -> dict:
    """Settings of a product on tensor cores for `n` rows, `m` outputs and rows of `half` bytes."""
    found = dict(_find(_settings()[name], n))
    blocks = -(-n // found["BM"]) * -(-m // found["BN"])
    if found["BM"] > 64 and blocks < SMALL_BLOCKS:
        return {"SPLIT": 1, **_find(_settings()[f"{name}_small"], n)}
    split = 1
    while n <= found["BM"] and n <= 64 and blocks * split < 198 and half // (split * 2) >= 4 * found["BK"]:
        split *= 2
    return {"SPLIT": split, **found}


def groups_launch(n: int, m: int, half: int) -> dict:
    """As [`w4_launch`] for weights or values with groups."""
    found = w4_launch(n, m, half, "groups")
    return found if found["SPLIT"] == 1 else {**found, "stages": 2}  # more programs, less shared memory each


def w8_row_launch(wide: int) -> dict:
    """Settings of a product of one row with a weight of bytes; `wide` is the padded number of words of a row."""
    found = dict(_find(_settings()["w8_row"], 1))
    return {"BN": max(1, min(16, found.pop("words") // wide)), **found}


def w8_launch(n: int) -> dict:
    """Settings of a product with a weight of bytes for `n` rows."""
    return _find(_settings()["w8"], n)


@cache
def _has_dependent_launch() -> bool:
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def launch_pdl(wanted: bool) -> dict:
    """The launch argument for programmatic dependent launch (Hopper and later), where it is wanted."""
    return {"launch_pdl": True} if wanted and _has_dependent_launch() else {}
