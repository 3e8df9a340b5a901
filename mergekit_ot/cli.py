"""`mergekit-ot run | check | plan | inspect | eval`: recipes from the command line, one line per error."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions, add_merge_options
from safetensors import SafetensorError

from mergekit_ot.anchors import CalibrationError
from mergekit_ot.bundle import BundleError, load_bundle
from mergekit_ot.compatibility import table
from mergekit_ot.pipeline import check_recipe, merge_recipe, plan_recipe
from mergekit_ot.recipe import PARAMETER_KEYS, RecipeError, load_recipe
from mergekit_ot.settings import Calibration, field_names
from mergekit_ot.solvers import NotConvergedError
from mergekit_ot.structure import UnsupportedModelError


#: What stands in a recipe, where some look for an option, and below which key.
KEYS = dict.fromkeys(PARAMETER_KEYS, "parameters") | dict.fromkeys(field_names(Calibration), "calibration")

#: Errors that say all a user needs; anything else is a defect and keeps its traceback.
EXPECTED = (
    RecipeError,
    CalibrationError,
    BundleError,
    NotConvergedError,
    UnsupportedModelError,
    FileNotFoundError,
    ValueError,
    OSError,
    SafetensorError,  # a full disk, while weights are written
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Merge models of different sizes and families with optimal-transport plans."""


class _Size(click.ParamType):
    """mergekit's sizes (`5B`, `200M`, plain numbers), with a message for anything else."""

    name = "size"

    def convert(self, value, param, ctx):
        try:
            size = parse_kmb(value)
        except (ValueError, IndexError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write a whole number, or one with K, M or B as in 5B.", param, ctx)
        return size


@cli.command()
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--plans", type=click.Path(), help="Folder of the plan bundle; solved there when it holds none.")
@add_merge_options
def run(merge_options: MergeOptions, recipe: str, out: str, plans: str | None) -> None:
    """Merge RECIPE into the folder OUT. Takes all options of mergekit-yaml."""
    merge_options.apply_global_options()
    _hush(merge_options.quiet)
    start = time.perf_counter()
    folder = merge_recipe(load_recipe(recipe), out, merge_options, plans=plans)
    from mergekit_ot.report.summary import describe_merge

    click.echo(describe_merge(json.loads((folder / "transport.json").read_text(encoding="utf-8"))))
    click.echo(
        f"{folder} is ready after {time.perf_counter() - start:.0f} s; `mergekit-ot eval {recipe} {folder}` measures it."
    )


for _option in run.params:
    if _option.name == "out_shard_size":
        _option.type = _Size()


@cli.command()
@click.argument("recipe", type=click.Path())
def check(recipe: str) -> None:
    """Say what will happen to each part of the pair, in seconds."""
    _, findings = check_recipe(load_recipe(recipe))
    click.echo(table(findings))


@cli.command()
@click.argument("recipe", type=click.Path())
@click.option("--plans", type=click.Path(), help="Folder of the plan bundle.")
@click.option("--device", default="cpu", show_default=True, help="Where models run and plans are solved.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def plan(recipe: str, plans: str | None, device: str, quiet: bool) -> None:
    """Solve and store the plans of RECIPE, to be reused by every alpha."""
    _hush(quiet)
    _, bundle, folder = plan_recipe(load_recipe(recipe), plans, device=device, quiet=quiet)
    click.echo(f"{folder}: {bundle.bytes() / 1e6:.1f} MB, {len(bundle.tensors)} tensors")


@cli.command()
@click.argument("plans", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The whole record.")
def inspect(plans: str, as_json: bool) -> None:
    """Show what a plan bundle knows of itself."""
    from mergekit_ot.report.summary import describe_bundle

    bundle = load_bundle(plans)
    click.echo(json.dumps(bundle.info, indent=1, sort_keys=True) if as_json else describe_bundle(bundle))


@cli.command(name="eval")
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--texts", type=click.Path(), help="Held-out texts; by default calibration texts that no plan has seen.")
@click.option("--plans", type=click.Path(), help="Folder of the plan bundle.")
@click.option("--report", type=click.Path(), help="Folder of the report; by default OUT.report.")
@click.option(
    "--max-tokens", default=8192, type=click.IntRange(min=1), show_default=True, help="Held-out tokens scored."
)
@click.option("--device", default="cpu", show_default=True, help="Where models run.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def evaluate(
    recipe: str,
    out: str,
    texts: str | None,
    plans: str | None,
    report: str | None,
    max_tokens: int,
    device: str,
    quiet: bool,
) -> None:
    """Score the merge in OUT beside the target and every control, and write the report."""
    from mergekit_ot.report.evaluate import evaluate_recipe
    from mergekit_ot.report.page import refuse_other_report, verdict, write_report

    _hush(quiet)
    place = Path(report or f"{out.rstrip('/')}.report")
    refuse_other_report(place)
    result = evaluate_recipe(
        load_recipe(recipe), Path(out), plans=plans, texts=texts, max_tokens=max_tokens, device=device, quiet=quiet
    )
    folder = write_report(result, place)
    for row in result.rows():
        click.echo(f"{row['model']:24} {row['loss']:.4f} nats per token")
    click.echo(verdict(result.losses).replace("**", ""))
    click.echo(f"report: {folder / 'report.md'}")


def _hush(quiet: bool) -> None:
    """`--quiet` is meant for the loading of weights too."""
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()


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


def main(arguments: list[str] | None = None) -> int:
    """Entry point; prints expected errors as one line on stderr and returns 1."""
    try:
        with ended_like_ctrl_c():
            cli.main(args=arguments, prog_name="mergekit-ot", standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since click 8.2
            error.show()
            return error.exit_code
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mergekit-ot"
        said = " ".join(error.format_message().split())
        if isinstance(error, click.NoSuchOption) and (name := error.option_name.strip("-").replace("-", "_")) in KEYS:
            said = f"{error.option_name} is no option: write {name!r} below {KEYS[name]!r} in the recipe."
        click.echo(f"{place}: {said} (see {place} --help)", err=True)
        return error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        return 130
    except KeyboardInterrupt:
        click.echo("interrupted; the next run resumes", err=True)
        return 130
    except EXPECTED as error:
        click.echo(f"mergekit-ot: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
