"""Ways into trl_mlc: trainer arguments, rows, datasets, saved state, command lines."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from hypothesis import strategies as st

from tests.hostile.inputs import anything, damaged_json, damaged_safetensors, mapping, nasty_paths, numbers, words
from tests.hostile.surfaces import Changed, Surface
from tests.mlc.conftest import byte_tokenizer, rows, tiny_llama
from trl_mlc import cli
from trl_mlc.arguments import OBJECTIVES, MLCArguments
from trl_mlc.data import IDS, LANGUAGES, LanguageTable, encode_prompts_of
from trl_mlc.dpo import MLCDPOConfig
from trl_mlc.extractor import Extractor, LanguageMeans
from trl_mlc.prompts import prompt_group, tokenize_prompt
from trl_mlc.state import CONFIG, WEIGHTS, load_state, save_state


def _fitting(field) -> st.SearchStrategy:
    known = {
        "mlc_layer": st.one_of(st.just("auto"), st.integers(-9, 9)),
        "mlc_pooling": st.sampled_from(["last", "mean", "max"]),
        "mlc_objective": st.sampled_from([*OBJECTIVES, "rank2"]),
        "mlc_sigma_norm": st.sampled_from(["top", "none", None]),
        "mlc_solver": st.sampled_from(["gram64", "svd", 64]),
        "mlc_languages": st.one_of(st.none(), st.lists(words, max_size=3)),
        "mlc_anchor": words,
    }
    if field.name in known:
        return known[field.name]
    return st.booleans() if isinstance(field.default, bool) else st.one_of(st.integers(-1, 9), numbers)


HOST = {"packing": st.booleans(), "torch_compile": st.booleans(), "beta": numbers, "max_steps": st.integers(-2, 5)}
arguments = mapping({field.name: _fitting(field) for field in dataclasses.fields(MLCArguments)} | HOST)


def construct(given: dict, folder: Path) -> None:
    """Arguments that are made hold numbers that can be computed with."""
    args = MLCDPOConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", **given)
    for field in dataclasses.fields(MLCArguments):
        value = getattr(args, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise Changed(f"{field.name}={value} was accepted")
    args.to_json_string()


# ---------------------------------------------------------------- rows
@functools.cache
def tokenizer():
    """One tokenizer for all cases."""
    return byte_tokenizer()


message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", ""]), "content": words})
prompt = st.one_of(words, st.lists(message, max_size=3), anything)
translations = st.one_of(
    st.dictionaries(st.sampled_from(["en", "sw", "bn", ""]), prompt, max_size=3),
    st.lists(st.fixed_dictionaries({"lang": st.sampled_from(["en", "sw", "bn"]), "prompt": prompt}), max_size=3),
    anything,
)
row = st.fixed_dictionaries(
    {"prompt_translations": translations},
    optional={
        "prompt": prompt,
        "messages": st.one_of(st.lists(message, max_size=3), anything),
        "chosen": prompt,
        "rejected": prompt,
        "tools": st.one_of(st.none(), words, anything),
        "chat_template_kwargs": st.one_of(st.none(), mapping({"x": anything})),
    },
)


def group(given: dict, folder: Path) -> None:  # noqa: ARG001
    """A row that is read gives token ids for every language in it."""
    found = prompt_group(given, "en", None)
    for language, text in found.items():
        ids = tokenize_prompt(tokenizer(), text, given)
        if not isinstance(language, str) or not all(isinstance(i, int) for i in ids):
            raise Changed(f"language {language!r}, ids {ids[:3]}")


#: Columns of one type, as any table has them, with holes.
texts = st.one_of(words, words, st.none(), st.just("say something"))
tables = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "prompt": st.lists(texts, min_size=n, max_size=n),
            "chosen": st.lists(words, min_size=n, max_size=n),
            "rejected": st.lists(words, min_size=n, max_size=n),
        },
        optional={
            "prompt_translations": st.one_of(
                st.lists(st.fixed_dictionaries({"sw": texts, "bn": texts}), min_size=n, max_size=n),
                st.lists(st.one_of(st.none(), st.fixed_dictionaries({"sw": texts})), min_size=n, max_size=n),
                st.lists(
                    st.lists(
                        st.fixed_dictionaries({"lang": st.sampled_from(["en", "sw"]), "prompt": texts}), max_size=2
                    ),
                    min_size=n,
                    max_size=n,
                ),
                st.lists(st.integers(-9, 9), min_size=n, max_size=n),
            )
        },
    )
)


def encode(case, folder: Path) -> None:  # noqa: ARG001
    """A dataset that is encoded has as many languages as prompts in each row, and something to compare."""
    columns, languages, limit = case
    args = MLCArguments(mlc_languages=languages, mlc_max_length=limit)
    done = encode_prompts_of(Dataset.from_dict(columns), tokenizer(), args, LanguageTable("en"))
    if any(len(ids) != len(numbers_) for ids, numbers_ in zip(done[IDS], done[LANGUAGES])):
        raise Changed("rows and languages differ")
    if max(map(len, done[LANGUAGES])) < 2:
        raise Changed("nothing to compare")


encoded = st.tuples(tables, st.one_of(st.none(), st.none(), st.lists(st.sampled_from(["sw", "bn", "xx"]), max_size=2)), st.sampled_from([1, 5, 512]))  # fmt: skip


# ---------------------------------------------------------------- state
def prepare_state(folder: Path) -> None:
    """An extractor and means on disk."""
    (folder / "whole").mkdir()
    means = LanguageMeans(3, 8, 0.9, torch.device("cpu"))
    save_state(folder / "whole", Extractor(8, 4, True, True, 0).state_dict(), means, {"layer": 2, "languages": ["en"]})


def load_damaged_state(seed: int, folder: Path) -> None:
    """Damaged state is refused, or its tensors are those that were saved."""
    place = folder / "damaged"
    place.mkdir(exist_ok=True)
    text, data = (folder / "whole" / CONFIG).read_text(), (folder / "whole" / WEIGHTS).read_bytes()
    (place / CONFIG).write_text(damaged_json(text, seed) if seed % 2 else text)
    (place / WEIGHTS).write_bytes(data if seed % 2 else damaged_safetensors(data, seed))
    found, whole = load_state(place), load_state(folder / "whole")
    same = set(found.extractor) == set(whole.extractor) and torch.equal(found.means, whole.means)
    if not same or not all(torch.equal(found.extractor[name], whole.extractor[name]) for name in found.extractor):
        raise Changed("another extractor or other means")


# ---------------------------------------------------------------- command line
def sandbox(folder: Path) -> None:
    """What command lines can name."""
    tiny_llama(tokenizer()).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    table = rows(4)
    lines = [json.dumps({name: table[name][i] for name in table}) for i in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "other.jsonl").write_text('{"title": "a"}\n')
    (folder / "broken.json").write_text('[{"prompt": "a"')
    (folder / "broken.yaml").write_text("mlc_weight: [")
    (folder / "tagged.yaml").write_text("mlc_weight: !!python/object/apply:os.system ['touch escape']\n")
    (folder / "unknown.yaml").write_text("mlc_wieght: 0.5\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")


#: `datasets` lists a folder and all below it; these are too large to be listed.
LARGE = ("/", "..", "../..", "~", "a\0b")
places = st.one_of(
    st.sampled_from(["model", "model", "rows.jsonl", "rows.jsonl", "other.jsonl", "broken.json", "broken", "out", "deep/out.json", "out.png"]),
    nasty_paths.filter(lambda path: path not in LARGE),
)  # fmt: skip
configs = st.sampled_from(["broken.yaml", "tagged.yaml", "unknown.yaml", "rows.jsonl", "no-such.yaml"])


def _command_lines() -> st.SearchStrategy[list[str]]:
    readers = {"evaluate": cli.EvaluateOptions, "scan": cli.ScanOptions}

    def value(field) -> st.SearchStrategy[list[str]]:
        fitting = numbers.map(str) if "int" in str(field.type) else places
        return st.one_of(fitting, words).map(lambda text: [f"--{field.name}={text}"])

    def line(name: str) -> st.SearchStrategy[list[str]]:
        kind = readers.get(name, cli.TrainOptions)
        fixed = st.tuples(places, places).map(lambda p: [f"--dataset_name={p[0]}", f"--model_name_or_path={p[1]}"])
        options = [value(field) for field in dataclasses.fields(kind)]
        options.append(configs.map(lambda path: [f"--config={path}"]))
        if name in ("sft", "dpo"):
            options.append(numbers.map(lambda n: [f"--mlc_weight={n}"]))
            fixed = fixed.map(lambda w: [*w, "--output_dir=out", "--max_steps=1", "--use_cpu", "--report_to=none", "--bf16=false"])  # fmt: skip
        return st.tuples(fixed, st.lists(st.one_of(options), max_size=2)).map(lambda p: [name, *p[0], *sum(p[1], [])])

    return st.one_of(
        [line(name) for name in ("evaluate", "scan", "evaluate", "scan", "sft", "dpo")]
        + [st.lists(places, max_size=3)]
    )


def call(words_: list[str], folder: Path) -> None:
    """As `main` does, without its net for errors."""
    try:
        code = cli.run(list(words_))
    finally:
        if (folder / "escape").exists():
            raise Changed("YAML ran a program")
    if code:
        raise SystemExit(code)


seeds = st.integers(0, 2**32)
SURFACES = {
    "mlc.arguments": Surface(arguments, construct),
    "mlc.rows": Surface(row, group),
    "mlc.data": Surface(encoded, encode),
    "mlc.state": Surface(seeds, load_damaged_state, prepare_state),
    "mlc.command_line": Surface(_command_lines(), call, sandbox, writes=True),
}
