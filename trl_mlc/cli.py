"""`trl-mlc sft | dpo | evaluate | scan`: TRL's parser, TRL's YAML, a few more options."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path


#: Errors that say all a user needs; anything else is a defect and keeps its traceback (as all do if the environment
#: has TRL_MLC_TRACEBACK).
EXPECTED = (ValueError, OSError, TypeError)
FIGURES = (".png", ".svg", ".pdf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
USAGE = """usage: trl-mlc {sft,dpo,evaluate,scan} [--config FILE.yaml] [options]

  sft, dpo   train as `trl sft` and `trl dpo` do, with the mlc_ options; data needs a prompt_translations column;
             --resume_from_checkpoint last goes on from the newest whole checkpoint, if there is one
  evaluate   score a model in every language; --before REPORT.json --figure OUT.png compares with an earlier report
  scan       print, per layer and pooling, how well translations find each other

`trl-mlc COMMAND --help` lists the options; a YAML file names them the same way."""


@dataclass
class DataOptions:
    """Where parallel rows come from."""

    dataset_name: str = field(metadata={"help": "A .json, .jsonl, .csv or .parquet file, a folder, or a hub dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    limit: int | None = field(default=None, metadata={"help": "Use only this many rows."})
    flat_prefix: str | None = field(
        default=None, metadata={"help": "Read flat columns with this prefix, such as 'prompt_', as translations."}
    )


@dataclass
class TrainOptions(DataOptions):
    """What `sft` and `dpo` read besides the model's and the trainer's options."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows for evaluation, if eval_strategy asks for it; dataset_name if absent."}
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Their split; 'test' of the same data set, else 'train'."}
    )


@dataclass
class ReadOptions(DataOptions):
    """What `evaluate` and `scan` read."""

    model_name_or_path: str = field(default="", metadata={"help": "Model folder or hub name; a PEFT adapter works."})
    anchor: str = field(default="en", metadata={"help": "Language of the prompt column."})
    languages: list[str] | None = field(
        default=None, metadata={"help": "Languages besides the anchor; all if absent."}
    )
    dtype: str = field(default="auto", metadata={"help": "Weights: auto, float32, bfloat16."})
    device: str = field(
        default="auto", metadata={"help": "Where the model runs: auto (a GPU if there is one), cpu, ..."}
    )
    output: str | None = field(default=None, metadata={"help": "Write the result here as JSON."})
    figure: str | None = field(default=None, metadata={"help": "Draw the result here (.png, .svg, .pdf)."})


@dataclass
class EvaluateOptions(ReadOptions):
    """Options of `evaluate`."""

    layer: int | None = field(
        default=None, metadata={"help": "Hidden state for retrieval; 0.8 of the depth if absent."}
    )
    pooling: str = field(default="last", metadata={"help": "'last' or 'mean'."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per forward."})
    before: str | None = field(default=None, metadata={"help": "An earlier report to compare the figure with."})


@dataclass
class ScanOptions(ReadOptions):
    """Options of `scan`."""

    poolings: list[str] = field(default_factory=lambda: ["last", "mean"], metadata={"help": "'last', 'mean' or both."})
    max_length: int = field(default=512, metadata={"help": "Longer prompts are left out."})


def load_rows(options):
    """Rows as the options describe them, as a `datasets.Dataset`."""
    from datasets import load_dataset

    from trl_mlc.parallel import from_flat_columns

    if not options.dataset_name.strip():
        raise ValueError("Name the rows with --dataset_name: a file, a folder or a hub dataset.")
    path = Path(options.dataset_name)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    try:
        if kind is not None:
            data = load_dataset(kind, data_files=str(path), split=options.dataset_split)
        else:
            data = load_dataset(options.dataset_name, name=options.dataset_config, split=options.dataset_split)
    except StopIteration:  # what `datasets` makes of an empty file
        data = ()
    if len(data) == 0:
        raise ValueError(f"{options.dataset_name} has no rows in split {options.dataset_split!r}.")
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}.")
        data = data.select(range(min(options.limit, len(data))))
    return data if options.flat_prefix is None else from_flat_columns(data, options.flat_prefix)


def load_eval_rows(options: TrainOptions):
    """Rows for evaluation during training."""
    split = options.eval_dataset_split or ("test" if options.eval_dataset_name is None else "train")
    name = options.dataset_name if options.eval_dataset_name is None else options.eval_dataset_name
    try:
        return load_rows(replace(options, dataset_name=name, dataset_split=split, limit=None))
    except ValueError as error:
        raise ValueError(
            f"No rows for evaluation: {error} Name some with --eval_dataset_name and --eval_dataset_split, or leave "
            "eval_strategy at 'no'."
        ) from error


def _parse(types: tuple, arguments: list[str], command: str):
    from trl import TrlParser

    try:
        return TrlParser(types, prog=f"trl-mlc {command}").parse_args_and_config(arguments)
    except ValueError:
        known = ["--" + option.name for kind in types for option in fields(kind)]
        names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        for name in names:
            near = get_close_matches(name, known, n=1, cutoff=0.8)
            if name not in known and near and name != "--config":
                raise ValueError(f"{command} has no option {name}; did you mean {near[0]}?") from None
        raise


@contextmanager
def _loading(name: str | None) -> Iterator[None]:
    """Say of a model that is neither a folder nor given by the hub that it is not here; hosts speak of connections."""
    if not name:
        raise ValueError("Name a model with --model_name_or_path.")
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{name!r} is no folder here, and the hub did not give such a model ({reason}).") from error


def _device(name: str):
    """The device of that name; `auto` is where a Trainer would put the model."""
    import torch
    from accelerate.state import PartialState

    if name == "auto":
        return PartialState().device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = (str(error).strip() or "no such device").splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used ({reason}); try auto or cpu.") from error


def _check_paths(options) -> None:
    """Refuse what could not be written at the end, before anything is computed."""
    for path in filter(None, (options.output, options.figure)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {Path(path).parent}.")
    if options.figure and Path(options.figure).suffix not in FIGURES:
        raise ValueError(f"--figure must end in one of {list(FIGURES)}, got {options.figure!r}.")


def _load_model(options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {list(DTYPES)}, got {options.dtype!r}.")
    device = _device(options.device)
    with _loading(options.model_name_or_path):
        model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=options.dtype)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(options.model_name_or_path)


def train(method: str, arguments: list[str]) -> None:
    """Run `sft` or `dpo`."""
    from trl import ModelConfig, get_peft_config, get_quantization_config

    from trl_mlc.checkpoints import is_finished, last_checkpoint, save_whole

    if method == "dpo":
        from trl_mlc.dpo import MLCDPOConfig as config_class
        from trl_mlc.dpo import MLCDPOTrainer as trainer_class
    else:
        from trl_mlc.sft import MLCSFTConfig as config_class
        from trl_mlc.sft import MLCSFTTrainer as trainer_class
    data_options, args, model_options = _parse((TrainOptions, config_class, ModelConfig), arguments, method)
    loading = {
        "revision": model_options.model_revision,
        "attn_implementation": model_options.attn_implementation,
        "dtype": model_options.dtype,
    }
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    rows = load_rows(data_options)
    held_out = load_eval_rows(data_options) if args.eval_strategy != "no" else None
    with _loading(model_options.model_name_or_path):
        trainer = trainer_class(
            model_options.model_name_or_path,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            quantization_config=get_quantization_config(model_options),
            peft_config=get_peft_config(model_options),
        )
    start = args.resume_from_checkpoint
    start = last_checkpoint(args.output_dir) if start == "last" else start
    if isinstance(start, str) and is_finished(
        start, args.max_steps, args.num_train_epochs
    ):  # the host would train one step more
        trainer._load_from_checkpoint(start)
    else:
        trainer.train(resume_from_checkpoint=start)
    save_whole(args.output_dir, trainer.save_model, trainer.accelerator.is_main_process)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")


def evaluate(arguments: list[str]) -> None:
    """Run `evaluate`."""
    from trl_mlc.evaluation.report import EvaluationReport, evaluate_model

    (options,) = _parse((EvaluateOptions,), arguments, "evaluate")
    if options.figure and not options.before:
        raise ValueError("--figure compares two reports; give the earlier one with --before.")
    _check_paths(options)
    before = EvaluationReport.load(options.before) if options.before else None
    model, tokenizer = _load_model(options)
    report = evaluate_model(
        model,
        tokenizer,
        load_rows(options),
        anchor=options.anchor,
        languages=options.languages,
        layer=options.layer,
        pooling=options.pooling,
        batch_size=options.batch_size,
    )
    report.settings["model"] = options.model_name_or_path
    print(report.table())
    if options.output:
        report.save(options.output)
    if options.figure and before is not None:
        from trl_mlc.plots import plot_languages

        plot_languages(before, report, options.figure)


def scan(arguments: list[str]) -> None:
    """Run `scan`."""
    import json

    from trl_mlc.data import LanguageTable, encode_prompts_of
    from trl_mlc.early_exit import decoder_of
    from trl_mlc.scan import best_layer, complete_groups, scan_layers

    (options,) = _parse((ScanOptions,), arguments, "scan")
    _check_paths(options)
    model, tokenizer = _load_model(options)

    class Reading:  # what encode_prompts_of needs of a trainer's arguments
        mlc_anchor, mlc_languages, mlc_max_length = options.anchor, options.languages, options.max_length

    rows = encode_prompts_of(load_rows(options), tokenizer, Reading, LanguageTable(options.anchor))
    groups = complete_groups(list(rows), len(rows))
    scores = scan_layers(decoder_of(model), groups, options.poolings)
    print(f"{len(groups)} prompts, {len(groups[0])} languages, chance {1 / len(groups):.3f}")
    print(f"{'layer':>5} {'pooling':>8} {'retrieval@1':>12} {'cosine':>8} {'cross-prompt':>13}")
    best = best_layer(scores)
    for score in scores:
        mark = "  <- auto" if score is best else ""
        print(
            f"{score.layer:>5} {score.pooling:>8} {score.retrieval:>12.3f} {score.cosine:>8.3f} "
            f"{score.cross_prompt_cosine:>13.3f}{mark}"
        )
    if options.output:
        Path(options.output).write_text(json.dumps([s._asdict() for s in scores], indent=2) + "\n", encoding="utf-8")
    if options.figure:
        from trl_mlc.plots import plot_layers

        plot_layers([s for s in scores if s.pooling == best.pooling], options.figure)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `trl-mlc`; wrong input is one line on standard error and status 2. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("trl-mlc: interrupted; --resume_from_checkpoint goes on from a checkpoint.", file=sys.stderr)
        return 130
    except Exception as error:
        hosts_own = type(error).__module__.partition(".")[0] in ("datasets", "huggingface_hub", "safetensors", "yaml")
        if "TRL_MLC_TRACEBACK" in os.environ or not (isinstance(error, EXPECTED) or hosts_own):
            raise
        print(f"trl-mlc: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    """Run one command line; errors are raised. Returns the exit status."""
    arguments = list(arguments)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command in ("sft", "dpo"):
        train(command, arguments)
    elif command in ("evaluate", "scan"):
        {"evaluate": evaluate, "scan": scan}[command](arguments)
    else:
        print(f"Unknown command {command!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
