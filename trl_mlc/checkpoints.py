"""Which checkpoint of a run to go on from, and a final save that leaves whole files only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from trl_mlc.state import WEIGHTS, load_state


STATE = "trainer_state.json"
SCRATCH = ".saving"


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run, or `None` where there is none.

    A trainer that is killed while it saves leaves a folder without the trainer's state, which it writes last;
    transformers' own `get_last_checkpoint` would choose that one and fail.

    Args:
        output_dir (`str` or `os.PathLike`): `output_dir` of the run; need not exist.

    Returns:
        `str`: the folder, for `trainer.train(resume_from_checkpoint=...)`.
    """
    folder = Path(output_dir)
    names = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(names, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return str(path)
    return None


def is_finished(checkpoint: str | os.PathLike, max_steps: int, epochs: float) -> bool:
    """Whether a run of `max_steps` steps (else, if not positive, of `epochs`) ends with this checkpoint."""
    try:
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        if max_steps > 0:
            return state["global_step"] >= max_steps
        return state["num_train_epochs"] >= epochs and state["global_step"] >= state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        if (folder / WEIGHTS).exists():
            load_state(folder)
    except (OSError, ValueError):
        return False
    return True


def save_whole(output_dir: str | os.PathLike, save: Callable[[str], None], is_main: bool = True) -> None:
    """Run `save` on a scratch folder inside `output_dir` and move its files into place, `config.json` last.

    Whoever finds a `config.json` of this save finds all its files whole.

    Args:
        output_dir (`str` or `os.PathLike`): where the files belong; created.
        save (`Callable[[str], None]`): writes into the folder it is given, on every process.
        is_main (`bool`, *optional*, defaults to `True`): whether this process moves the files.
    """
    scratch = Path(output_dir) / SCRATCH
    if is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ("config.json", "adapter_config.json"):
            (Path(output_dir) / name).unlink(missing_ok=True)
    save(str(scratch))
    if is_main:
        for path in sorted(scratch.iterdir(), key=lambda p: p.name in ("config.json", "adapter_config.json")):
            os.replace(path, Path(output_dir) / path.name)
        scratch.rmdir()
