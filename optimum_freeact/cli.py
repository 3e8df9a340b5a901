"""The command line: `freeact quantize | evaluate | inspect | export | compare`.

Only this file knows arguments, exit codes and the user's standard error. The commands, and with them everything that
takes long to import, are imported when one is called.

Exit codes: 0 done; 1 `compare` finished but a preset failed; 2 a wrong input, in one line on standard error;
130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from optimum_freeact.commands.options import add_settings
from optimum_freeact.presets import PRESETS
from optimum_freeact.version import VERSION


DTYPES = ("auto", "float32", "bfloat16", "float16")
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


class _Version(argparse.Action):
    """`--version`: ours, and that of the libraries whose behaviour it depends on."""

    def __call__(self, parser: argparse.ArgumentParser, *rest) -> None:  # noqa: ARG002
        import platform
        from importlib.metadata import version

        hosts = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"hf-concord {VERSION} ({hosts}, python {platform.python_version()})")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or name of the tokenizer; default: the model's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in; default: float32 on a CPU, the checkpoint's own on a GPU"
    )
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text to evaluate on")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens a window (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=20480, metavar="N", help="tokens in all, in whole windows (default %(default)s)"
    )


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace an earlier {what}")
    parser.add_argument(
        "--resume-dir", metavar="DIR", help="keep finished blocks here, so that an interrupted calibration goes on"
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="freeact", description="4-bit weights, activations and KV cache for transformers models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    add_commands(parser)
    return parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add all subcommands to a parser: that of `freeact`, or of a command line that offers them under its own name."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    quantize = commands.add_parser("quantize", help="calibrate and save a quantized model")
    quantize.add_argument("model", metavar="MODEL", help="full-precision model: a folder or a name on the hub")
    quantize.add_argument("out", metavar="OUT", help="folder to write; appears only when everything went well")
    quantize.add_argument(
        "--dataset", required=True, metavar="DATA", help="calibration data: a .txt or .jsonl file or a dataset's name"
    )
    quantize.add_argument("--preset", default="freeact", metavar="NAME", help=f"{', '.join(PRESETS)}; default freeact")
    _add_output(quantize, "result in OUT")
    _add_common(quantize)
    add_settings(quantize)

    evaluate = commands.add_parser("evaluate", help="perplexity of a model, quantized or not")
    evaluate.add_argument("model", metavar="MODEL")
    _add_text(evaluate)
    evaluate.add_argument("--json", metavar="FILE", help="write the result here too")
    _add_common(evaluate)

    inspect = commands.add_parser("inspect", help="what is quantized, what is not and why, and what will run it")
    inspect.add_argument("model", metavar="MODEL")
    inspect.add_argument("--device", help="where it would run; default: cuda where there is one, else cpu")
    inspect.add_argument("--json", metavar="FILE", help="write what was found here too")
    _add_quiet(inspect)

    export = commands.add_parser(
        "export", help="write a quantized model in the compressed-tensors format, if it can say it"
    )
    export.add_argument("model", metavar="MODEL", help="a model quantized by freeact")
    export.add_argument("out", metavar="OUT", help="folder to write; appears only when everything went well")
    export.add_argument("--tokenizer", metavar="NAME", help="folder or name of the tokenizer; default: the model's")
    export.add_argument(
        "--layout", choices=("auto", "packed"), default="auto",
        help="how codes are stored: auto, as transformers reads them (packed for weights alone, else a byte each), or packed "
        "in any case, as vLLM wants them beside integer activations; default %(default)s",
    )  # fmt: skip
    export.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
    _add_quiet(export)

    compare = commands.add_parser("compare", help="presets side by side: a table, JSON, Markdown and a figure")
    compare.add_argument("model", metavar="MODEL", help="full-precision model: a folder or a name on the hub")
    compare.add_argument("--dataset", required=True, metavar="DATA", help="calibration data, as in quantize")
    _add_text(compare)
    compare.add_argument("--out", required=True, metavar="DIR", help="folder for the report")
    compare.add_argument("--presets", default="rtn,quarot,freeact", metavar="A,B", help="default %(default)s")
    compare.add_argument("--schemes", default="W4A16,W4A4,W4A4KV4", metavar="A,B", help="default %(default)s")
    _add_output(compare, "report in --out")
    _add_common(compare)
    add_settings(compare, ["n_samples", "seq_len", "batch_size", "seed"])


def command_named(name: str) -> Callable[[argparse.Namespace], int | None]:
    """The function that runs a subcommand; imports torch, transformers and the rest of the package."""
    if name == "quantize":
        from optimum_freeact.commands.quantize import run as quantize

        return quantize
    if name == "evaluate":
        from optimum_freeact.commands.evaluate import run as evaluate

        return evaluate
    if name == "inspect":
        from optimum_freeact.commands.inspect import run as inspect

        return inspect
    if name == "export":
        from optimum_freeact.commands.export import run as export

        return export
    from optimum_freeact.commands.compare import run as compare

    return compare


@contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Keep transformers to errors, and its bars away if asked, while a command runs."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    if quiet:
        chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """A polite end from outside (SIGTERM: a scheduler, `timeout`) counts as Ctrl-C, so that nothing half-made is left."""
    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (by default the process's); returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_WRONG_INPUT
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:
            known = ["--" + name.replace("_", "-") for name in vars(args)]
            near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"{args.command} does not know {' '.join(unknown)}{hint}")
    except SystemExit as stop:  # --help, or a line that cannot be read
        return int(stop.code or 0)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Run a parsed command; returns the exit code, and says on standard error what was wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from safetensors import SafetensorError

    try:
        with ended_like_ctrl_c(), quiet_libraries(args.quiet):
            return command_named(args.command)(args) or 0
    except KeyboardInterrupt:
        print(f"\nfreeact {args.command}: interrupted. {_how_to_resume(args)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, TypeError, SafetensorError) as error:
        if args.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"freeact {args.command}: error: {message}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _how_to_resume(args: argparse.Namespace) -> str:
    if not hasattr(args, "resume_dir"):
        return "Nothing was written."
    if args.resume_dir:
        return f"Finished blocks are kept in {args.resume_dir}: run the same command again to go on from there."
    return (
        "Nothing was written. With --resume-dir DIR finished blocks are kept, and the same command goes on from there."
    )


if __name__ == "__main__":
    sys.exit(main())
