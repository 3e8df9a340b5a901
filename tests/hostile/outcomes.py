"""What counts as an explained failure, and what a run has left on the disk.

An explained failure is an exception that somebody meant: raised by a `raise` statement of one of our packages or of a
host library, or made by the file system or a file format's own reader, with a message. An accident (an attribute of the
wrong object, a missing key, a value that reached a kernel) is not explained, even if its type is `ValueError`.
"""

import ast
import functools
import hashlib
import traceback
from pathlib import Path


OURS = ("optimum_freeact", "trl_mlc", "mergekit_ot")
HOSTS = ("transformers", "trl", "mergekit", "peft", "accelerate", "huggingface_hub", "datasets", "tokenizers", "click")
LIBRARIES = (*HOSTS, "safetensors", "pydantic", "pydantic_core", "yaml", "argparse", "jinja2", "pyarrow", "torch")
#: Kinds of exception that no user should ever meet, whoever raised them.
NEVER = (AttributeError, KeyError, IndexError, AssertionError, ZeroDivisionError, RecursionError, UnboundLocalError)


@functools.lru_cache(maxsize=512)
def _raises(path: str) -> list[tuple[int, int]]:
    """First and last line of every raise statement of a source file."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    return [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def _owner(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return next((part for part in parts if part in (*OURS, *LIBRARIES)), "")


def unexplained(error: BaseException) -> str | None:
    """Why an exception is no error message for a user; `None` when it is one."""
    if isinstance(error, SystemExit):
        return None if error.code in (0, 1, 2) else f"exit code {error.code}"
    message = str(error).strip()
    if isinstance(error, NEVER):
        return f"{type(error).__name__}: {message[:300]} at {place(error)}"
    if len(message) < 15:
        return f"{type(error).__name__} says only {message!r} at {place(error)}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return None  # the system's own message, with the file's name
    if type(error).__module__.partition(".")[0] in LIBRARIES:
        return None  # a host's own kind of error
    if isinstance(error, TypeError) and "__init__() got an unexpected keyword argument" in message:
        return None  # Python's own message names the class and the argument
    last = traceback.extract_tb(error.__traceback__)[-1]
    meant = any(first <= last.lineno <= final for first, final in _raises(last.filename))
    if meant and _owner(last.filename):
        return None
    return f"{type(error).__name__} by accident: {message[:300]} at {place(error)}"


def place(error: BaseException) -> str:
    """The innermost frame of ours, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _owner(frame.filename) in OURS] or frames
    shown = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]
    return " / ".join(dict.fromkeys(shown))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content, every empty folder with none."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "broken link"
        elif not any(path.iterdir()):
            found[name] = ""
    return found
