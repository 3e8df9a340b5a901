"""New processes of Python that need not import torch, transformers and PEFT again: forked from one that did, once.

[`run`] answers as `subprocess.run` does. The process that is forked has loaded nothing of ours, and nothing that is set up by
variables which it does not have itself (`IMPORTED`); a test that asks what an import costs, brings or reads needs a process
of its own (`quantized.fresh_python`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
OURS = ("optimum_freeact", "trl_mlc", "mergekit_ot")
IMPORTED = (
    "torch",
    "transformers.quantizers.auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "scipy.optimize",
)
LATER = ("datasets", "trl", "mergekit", "matplotlib")  # read variables when imported, or have tests that say when
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment(**changes: str) -> dict[str, str]:
    """This process's variables, with the repository on Python's path, one thread, and no hub."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **changes}


def ranks(n: int) -> list[dict[str, str]]:
    """Variables of `n` processes of one group, as torchrun sets them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(n)}
    return [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)} for rank in range(n)]


def run(
    *words: str, code: str | None = None, module: str | None = None, cwd: str = "/", **variables: str
) -> subprocess.CompletedProcess:
    """Run code, `-m module` or a script (the first of `words`), with words as its arguments."""
    return together([variables], *words, code=code, module=module, cwd=cwd)[0]


def together(
    variables: list[dict[str, str]],
    *words: str,
    code: str | None = None,
    module: str | None = None,
    cwd: str = "/",
    timeout: float = 300,
) -> list[subprocess.CompletedProcess]:
    """The same in several processes at once, one for each set of variables."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        asked = [
            {
                "code": code, "module": module, "words": words, "cwd": cwd, "environment": environment(**changes),
                "stdout": f"{folder}/{number}.out", "stderr": f"{folder}/{number}.err",
            }
            for number, changes in enumerate(variables)
        ]  # fmt: skip
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        if not select.select([parent.stdout], [], [], timeout)[0]:
            _end()
            raise TimeoutError(f"{module or code or words[0]} took longer than {timeout:.0f} s")
        codes = json.loads(parent.stdout.readline())
        return [
            subprocess.CompletedProcess(words, done, *(Path(each[name]).read_text() for name in ("stdout", "stderr")))
            for done, each in zip(codes, asked, strict=True)
        ]


@functools.cache
def _parent() -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.forked"]
    atexit.register(_end)
    return subprocess.Popen(
        command, env=environment(), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def _end() -> None:
    if _parent.cache_info().currsize:
        os.killpg(_parent().pid, signal.SIGKILL)
        _parent().wait()
        _parent.cache_clear()


# ---------------------------------------------------------------- the process that is forked
def serve() -> dict:
    """Fork what is asked for, line by line; returns in each fork, with what it is to do."""
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for each in asked:
            children.append(os.fork())
            if not children[-1]:
                return each
        sys.stdout.write(json.dumps(codes_of(children)) + "\n")
        sys.stdout.flush()
    os._exit(0)


def codes_of(children: list[int]) -> list[int]:
    """Wait for all; the first that fails ends the others, which might wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def become(asked: dict) -> None:
    """Be a process that was started for this."""
    for stream, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((asked[n], os.O_WRONLY | os.O_CREAT) for n in ("stdout", "stderr"))]
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, stream)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.path[0] = ""  # what `-c` and `-m` put there
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if asked["code"] is not None:
        sys.argv = ["-c", *asked["words"]]
        exec(compile(asked["code"], "<string>", "exec"), main.__dict__)
    elif asked["module"] is not None:
        sys.argv = [asked["module"], *asked["words"]]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(asked["words"]), os.path.dirname(asked["words"][0])
        runpy.run_path(asked["words"][0], run_name="__main__")


def prepare() -> None:
    """Import what every process would; whether it may be forked afterwards is seen."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # not everybody installs all of them
            importlib.import_module(name)
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {*OURS, *LATER}, loaded & {*OURS, *LATER}
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "threads do not survive a fork"
    gc.freeze()


def leave(work: Callable[[], None]) -> None:
    """End as an interpreter does, without taking thousands of modules apart."""
    code: str | int | None = 0
    try:
        work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        sys.stderr.write(code + "\n")
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    prepare()
    told = serve()
    leave(lambda: become(told))
