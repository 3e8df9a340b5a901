"""What the commands of `trl-mlc` read: their options, by TRL's parser, and what can be refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path


FIGURES = (".png", ".svg", ".pdf")
NO_GPU = "Your setup doesn't support bf16"  # how transformers begins; TRL's configs ask for bfloat16


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
    before: str | None = field(
        default=None, metadata={"help": "An earlier report to compare with, in the table and the figure."}
    )


@dataclass
class ScanOptions(ReadOptions):
    """Options of `scan`."""

    poolings: list[str] = field(default_factory=lambda: ["last", "mean"], metadata={"help": "'last', 'mean' or both."})
    max_length: int = field(default=512, metadata={"help": "Longer prompts are left out."})


def parse(types: tuple, arguments: list[str], command: str):
    """Read a command's options from its arguments and its YAML file.

    Raises:
        `ValueError`: for options that do not exist or do not go together.
    """
    from trl import TrlParser

    def refuse(message: str):  # argparse would print all options, nearly two hundred lines of them
        raise ValueError(f"{message} (see trl-mlc {command} --help)")

    parser = TrlParser(types, prog=f"trl-mlc {command}")
    parser.error = refuse
    try:
        return parser.parse_args_and_config(arguments)
    except ValueError as error:
        known = ["--" + option.name for kind in types for option in fields(kind)]
        names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        for name in names:
            near = get_close_matches(name, known, n=1, cutoff=0.8)
            if name not in known and near and name != "--config":
                raise ValueError(f"{command} has no option {name}; did you mean {near[0]}?") from None
        if str(error).startswith(NO_GPU):
            raise ValueError(
                f"{command} found no GPU with bfloat16 here. Add --use_cpu to train on the CPU, or --bf16 False."
            ) from error
        raise


def check_paths(options) -> None:
    """Refuse what could not be written at the end, before anything is computed."""
    for path in filter(None, (options.output, options.figure)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {Path(path).parent}.")
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; name the file to write.")
    if options.figure and Path(options.figure).suffix not in FIGURES:
        raise ValueError(f"--figure must end in one of {list(FIGURES)}, got {options.figure!r}.")
