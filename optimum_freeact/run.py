"""Run a program that does not know this package on FreeAct checkpoints.

    python -m optimum_freeact.run -m lm_eval --model hf --model_args pretrained=model-w4a4 ...
    python -m optimum_freeact.run script.py ...
    python -m optimum_freeact.run some-command ...

transformers learns a quantization method only from an import: without it a FreeAct checkpoint does not load (it fails with
a size mismatch). This module imports the package and then runs the program in the same process as if it had been called
itself. For several processes put it inside the launcher: `accelerate launch -m optimum_freeact.run -m lm_eval ...`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys

from optimum_freeact.hf import registration


USAGE = "usage: python -m optimum_freeact.run (-m MODULE | SCRIPT | COMMAND) [ARGUMENTS ...]"


def main(arguments: list[str]) -> None:
    """Run a module, script or installed Python command with its arguments.

    Args:
        arguments (`list[str]`): As after `python`: `["-m", module, ...]`, or a script or command and its arguments.

    Raises:
        `SystemExit`: for no program, or one that is not found.
    """
    registration.register()
    if not arguments or arguments == ["-m"] or arguments[0] in ("-h", "--help"):
        raise SystemExit(USAGE)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    program = arguments[0] if os.path.exists(arguments[0]) else shutil.which(arguments[0])
    if program is None:
        raise SystemExit(f"{arguments[0]!r} is neither a file nor a command.\n{USAGE}")
    sys.argv = [program, *arguments[1:]]
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
