"""`trl-mlc sft | dpo | evaluate | scan`: TRL's parser, TRL's YAML, a few more options."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trl_mlc.command_options import EvaluateOptions, ScanOptions, TrainOptions, check_paths, parse
from trl_mlc.rows import load_eval_rows, load_rows


#: Errors that say all a user needs; anything else is a defect and keeps its traceback (as all do if the environment
#: has TRL_MLC_TRACEBACK).
EXPECTED = (ValueError, OSError, TypeError, PackageNotFoundError)
COMMANDS = ("sft", "dpo", "evaluate", "scan")
DTYPES = ("auto", "float32", "bfloat16", "float16")
USAGE = """usage: trl-mlc {sft,dpo,evaluate,scan} [--config FILE.yaml] [options]

  sft, dpo   train as `trl sft` and `trl dpo` do, with the mlc_ options; data needs a prompt_translations column;
             --resume_from_checkpoint last goes on from the newest whole checkpoint, if there is one
  evaluate   score a model in every language; --before REPORT.json compares with an earlier report, --figure draws it
  scan       print, per layer and pooling, how well translations find each other

`trl-mlc COMMAND --help` lists the options; a YAML file names them the same way. `trl-mlc --version` names versions."""


def _named(name: str | None) -> str:
    if not name:
        raise ValueError("Name a model with --model_name_or_path.")
    return name


@contextmanager
def _loading(name: str | None) -> Iterator[None]:
    """Say of a model that is neither a folder nor given by the hub that it is not here; hosts speak of connections."""
    name = _named(name)
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
    import warnings

    from trl import ModelConfig, get_peft_config, get_quantization_config

    from trl_mlc.checkpoints import is_finished, last_checkpoint, save_whole

    if method == "dpo":
        from trl_mlc.dpo import MLCDPOConfig as config_class
        from trl_mlc.dpo import MLCDPOTrainer as trainer_class
    else:
        from trl_mlc.sft import MLCSFTConfig as config_class
        from trl_mlc.sft import MLCSFTTrainer as trainer_class
    # TRL's own default wears an old name, of which transformers warns whatever one writes
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    data_options, args, model_options = parse((TrainOptions, config_class, ModelConfig), arguments, method)
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

    (options,) = parse((EvaluateOptions,), arguments, "evaluate")
    if options.figure and not options.before:
        raise ValueError("--figure compares two reports; give the earlier one with --before.")
    check_paths(options)
    before = EvaluationReport.load(options.before) if options.before else None
    _named(options.model_name_or_path)
    rows = load_rows(options)
    model, tokenizer = _load_model(options)
    report = evaluate_model(
        model,
        tokenizer,
        rows,
        anchor=options.anchor,
        languages=options.languages,
        layer=options.layer,
        pooling=options.pooling,
        batch_size=options.batch_size,
    )
    report.settings["model"] = options.model_name_or_path
    print(report.table(before))
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

    (options,) = parse((ScanOptions,), arguments, "scan")
    check_paths(options)
    _named(options.model_name_or_path)
    table = load_rows(options)
    model, tokenizer = _load_model(options)

    class Reading:  # what encode_prompts_of needs of a trainer's arguments
        mlc_anchor, mlc_languages, mlc_max_length = options.anchor, options.languages, options.max_length

    rows = encode_prompts_of(table, tokenizer, Reading, LanguageTable(options.anchor))
    groups = complete_groups(list(rows), len(rows))
    scores = scan_layers(decoder_of(model), groups, options.poolings)
    print(f"{len(groups)} prompts, {len(groups[0])} languages, chance {1 / len(groups):.3f}")
    print(f"{'layer':>5} {'pooling':>8} {'retrieval@1':>12} {'cosine':>8} {'cross-prompt':>13}")
    best = {p: best_layer([s for s in scores if s.pooling == p]) for p in options.poolings}
    for score in scores:
        mark = f"  <- auto, with mlc_pooling {score.pooling}" if score is best[score.pooling] else ""
        print(
            f"{score.layer:>5} {score.pooling:>8} {score.retrieval:>12.3f} {score.cosine:>8.3f} "
            f"{score.cross_prompt_cosine:>13.3f}{mark}"
        )
    if options.output:
        Path(options.output).write_text(json.dumps([s._asdict() for s in scores], indent=2) + "\n", encoding="utf-8")
    if options.figure:
        from trl_mlc.plots import plot_layers

        plot_layers([s for s in scores if s.pooling == best_layer(scores).pooling], options.figure)


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
    if command == "--version":
        print(" ".join(f"{name} {version(name)}" for name in ("hf-concord", "trl", "transformers", "torch")))
        return 0
    if command not in COMMANDS:
        raise ValueError(
            f"Unknown command {command!r}; known are {', '.join(COMMANDS)} (other trainers are used from Python)."
        )
    if command in ("sft", "dpo"):
        train(command, arguments)
    else:
        {"evaluate": evaluate, "scan": scan}[command](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
