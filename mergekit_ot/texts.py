"""Read calibration text from a `.jsonl` or plain text file."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_ot.anchors import CalibrationError
from mergekit_ot.settings import Calibration


#: Shorter texts give no row that is not near its start.
MIN_CHARACTERS = 40


def read_texts(calibration: Calibration, folder: str | Path = ".") -> list[str]:
    """Texts of a calibration file, in file order; duplicates and very short ones are left out.

    Args:
        calibration ([`Calibration`]): names the file, relative to `folder` unless absolute.
        folder (`str | Path`): usually the recipe's folder.

    Raises:
        [`CalibrationError`]: when the file is missing, malformed or holds no usable text.
    """
    path = Path(folder) / calibration.dataset
    if not path.is_file():
        raise CalibrationError(f"calibration.dataset: there is no file {path}; give a .jsonl or a text file.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:  # a failing read does not name its file
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        texts = [_json_text(path, i, line, calibration.text_key) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        texts = [line.strip() for line in lines]
    usable = list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARACTERS))
    if not usable:
        raise CalibrationError(f"{path} holds no text of at least {MIN_CHARACTERS} characters.")
    return usable


def _json_text(path: Path, number: int, line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise CalibrationError(
            f"{path}, line {number}: no text under the key {key!r}; set calibration.text_key to one of "
            f"{sorted(value) if isinstance(value, dict) else []}."
        )
    return value[key]
