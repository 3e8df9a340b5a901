"""`save_pretrained` of a quantized model: its files appear together or not at all.

transformers writes config and weights into the folder one after the other; on a full disk half a model stays there. Here
they are written into a hidden folder inside it and moved out when all are complete.
"""

from __future__ import annotations

import os
import re
import shutil
import types
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from optimum_freeact.scratch import scratch_beside


SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def install(model: nn.Module) -> None:
    """Give one model this way of saving, under the name and with the arguments of `save_pretrained`."""
    if hasattr(type(model), "save_pretrained"):
        model.__dict__["save_pretrained"] = types.MethodType(save_pretrained, model)


def remove(model: nn.Module) -> None:
    """Let the model save as its class does."""
    model.__dict__.pop("save_pretrained", None)


def save_pretrained(self: nn.Module, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """As `PreTrainedModel.save_pretrained`, but that nothing changes in the folder if writing fails.

    Pushing to a hub, and processes other than the main one, save as transformers does.

    Raises:
        `OSError`: if writing fails; the folder is as it was.
    """
    plain = type(self).save_pretrained
    main = args[0] if args else kwargs.get("is_main_process", True)
    if not main or len(args) > 1 or kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint"):
        return plain(self, save_directory, *args, **kwargs)
    folder = Path(save_directory)
    if folder.is_file():
        raise FileExistsError(f"{str(folder)!r} is a file: name a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = scratch_beside(folder / "saving")
        try:
            plain(self, scratch, *args, **kwargs)
            written = {path.name for path in scratch.iterdir()}
            if any(name == "model.safetensors" or SHARD.fullmatch(name) for name in written):  # no adapters alone
                for old in [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]:
                    if old.name not in written:  # of an earlier save
                        old.unlink()
            for name in sorted(written, key=lambda name: name == "config.json"):  # what announces the rest comes last
                os.replace(scratch / name, folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise failed(self, folder, error) from error
    return None


def failed(model: nn.Module, folder: Path, error: Exception) -> OSError:
    """What to raise when a model could not be written: why, and how much room there is and was needed."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return OSError(
        f"Saving to {str(folder)!r} failed ({error}); nothing was left there. "
        f"{shutil.disk_usage(parent).free / 1e6:.0f} MB are free, the model takes about "
        f"{model.get_memory_footprint() / 1e6:.0f} MB: free space or name another folder."
    )
