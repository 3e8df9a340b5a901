"""Ways into optimum_freeact: configs, calibration data, checkpoints, command lines."""

import functools
import json
import math
from pathlib import Path

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from optimum_freeact import FreeActConfig
from optimum_freeact.calibration.data import load_samples
from optimum_freeact.cli import build_parser, command_named, quiet_libraries
from optimum_freeact.config_fields import CHOICES, DEFAULTS, RECORDED
from optimum_freeact.presets import PRESETS
from tests.helpers.quantized import quantized
from tests.helpers.tiny_models import sample_ids, tiny, tiny_tokenizer
from tests.hostile.inputs import anything, damaged_json, damaged_safetensors, mapping, nasty_paths, numbers, words
from tests.hostile.surfaces import Changed, Surface


def _fitting(name: str) -> st.SearchStrategy:
    if name in CHOICES:
        return st.sampled_from([*CHOICES[name], 5, "none", None])
    default = DEFAULTS.get(name, PRESETS["freeact"].get(name))
    if isinstance(default, int) and not isinstance(default, bool):
        return st.integers(-1, 64)
    if isinstance(default, float):
        return numbers
    known = {
        "token_types": st.lists(st.sampled_from(["text", "sink", "image"]), max_size=3),
        "weight_group_size": st.one_of(st.none(), st.integers(-1, 256)),
        "activation_group_size": st.one_of(st.none(), st.integers(-1, 256)),
        "modules_to_not_convert": st.one_of(st.none(), st.lists(words, max_size=3)),
        "activation_clip": st.one_of(st.just("search"), st.floats(-1, 2)),
        "weight_clip": st.one_of(st.just("search"), st.floats(-1, 2)),
    }
    return known.get(name, anything)


NAMES = sorted({*DEFAULTS, *PRESETS["freeact"], *RECORDED, "format_version", "quant_method"})
arguments = st.tuples(
    st.one_of(st.sampled_from(sorted(PRESETS)), st.sampled_from(sorted(PRESETS)), anything),
    mapping({name: _fitting(name) for name in NAMES}),
)


def construct(case, folder: Path) -> None:  # noqa: ARG001
    """A config that is made can be written as JSON and read back equal."""
    preset, given = case
    config = FreeActConfig(preset, **given)
    plain = config.to_dict()
    if {name: plain[name] for name in plain if plain[name] != plain[name]}:
        raise Changed("NaN was accepted")
    again = FreeActConfig(**json.loads(json.dumps(plain, default=repr)))
    if json.dumps(again.to_dict(), sort_keys=True) != json.dumps(plain, sort_keys=True, default=repr):
        raise Changed("the config changes when it is written and read")
    assert config.scheme.startswith("W")
    repr(config)


# ---------------------------------------------------------------- data
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": anything}), max_size=3
)
rows = st.one_of(words, anything, chats, st.fixed_dictionaries({"text": st.one_of(words, anything)}))
tensors = st.builds(
    lambda shape, dtype, high: torch.randint(0, high, shape).to(dtype),
    st.lists(st.integers(0, 12), max_size=3).map(tuple),
    st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool]),
    st.sampled_from([1, 50, 104, 105, 2**20]),
)
data = st.one_of(
    st.tuples(st.just("value"), st.one_of(anything, st.lists(rows, max_size=4), tensors, st.binary(max_size=8))),
    st.tuples(st.sampled_from([".txt", ".jsonl", ".json"]), st.one_of(st.binary(max_size=60), st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")))),
    st.tuples(st.just(".jsonl"), st.lists(rows, max_size=4).map(lambda r: "\n".join(json.dumps(x) for x in r).encode())),
    st.tuples(st.just("path"), nasty_paths),
)  # fmt: skip


@functools.cache
def tokenizer():
    """One tokenizer for all cases."""
    made = tiny_tokenizer()
    made.chat_template = made.chat_template or "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def read(case, folder: Path) -> None:
    """Whatever is given becomes windows of valid ids, or an error."""
    kind, value = case
    if kind.startswith("."):
        path = folder / f"data{kind}"
        path.write_bytes(value)
        value = str(path)
    windows = load_samples(value, tokenizer(), 2, 4, 0, 104)
    if (
        windows.shape != (2, 4)
        or windows.dtype != torch.int64
        or not 0 <= int(windows.min()) <= int(windows.max()) < 104
    ):
        raise Changed(f"windows of {windows.dtype}, {tuple(windows.shape)}")


# ---------------------------------------------------------------- checkpoints
def _save(folder: Path) -> None:
    quantized("llama", {"num_hidden_layers": 1}).save_pretrained(folder / "whole")


IDS = sample_ids(2, 12, seed=5)
seeds = st.integers(0, 2**32)


@functools.cache
def _expected(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder / "whole")(IDS).logits


def load_damaged_weights(seed: int, folder: Path) -> None:
    """A damaged file gives an error or the very same logits."""
    expected, source, place = _expected(folder), folder / "whole", folder / "damaged"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_bytes((source / "config.json").read_bytes())
    (place / "model.safetensors").write_bytes(damaged_safetensors((source / "model.safetensors").read_bytes(), seed))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(place)(IDS).logits
    if not torch.equal(logits, expected):
        raise Changed("other logits")


def load_damaged_config(seed: int, folder: Path) -> None:
    """A changed quantization config gives an error or a model that runs."""
    source, place = folder / "whole", folder / "damaged"
    place.mkdir(exist_ok=True)
    text = json.loads((source / "config.json").read_text())
    changed = damaged_json(json.dumps(text["quantization_config"]), seed, ("calibration_record",))
    try:
        text["quantization_config"] = json.loads(changed)
    except json.JSONDecodeError:
        text = json.dumps(text, indent=1).replace('"preset"', changed[:40], 1)
    (place / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    (place / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        logits = model(IDS).logits
    if not math.isfinite(float(logits.sum())):
        raise Changed("logits are not finite")


# ---------------------------------------------------------------- command line
def _sandbox(folder: Path) -> None:
    tiny("llama", num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    quantized("llama", {"num_hidden_layers": 1}).save_pretrained(folder / "quantized")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "text.tex").write_text("years of work")
    (folder / "texts.txt").write_text("some words to calibrate on, again and again\n" * 40)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{')


places = st.one_of(
    st.sampled_from(["model", "model", "quantized", "broken", "thesis", "texts.txt", "bad.jsonl", "out", "deep/out", "new.json"]),
    nasty_paths.filter(lambda path: "\0" not in path),
)  # fmt: skip


def _command_lines() -> st.SearchStrategy[list[str]]:
    parser = build_parser()
    commands = next(action for action in parser._actions if action.choices).choices

    def value(action) -> st.SearchStrategy[list[str]]:
        flag = max(action.option_strings, key=len, default=None)
        if action.nargs == 0:
            return st.just([flag])
        if action.choices:
            fitting = st.sampled_from([str(choice) for choice in action.choices])
        elif action.type in (int, float):
            fitting = numbers.map(str)
        else:
            fitting = places
        chosen = st.one_of(fitting, fitting, fitting, words)
        return chosen.map(lambda text: [text] if flag is None else [f"{flag}={text}"])

    def line(name: str) -> st.SearchStrategy[list[str]]:
        actions = [action for action in commands[name]._actions if action.dest not in ("help", "traceback")]
        needed = [value(a) for a in actions if not a.option_strings or a.required]
        rest = st.lists(st.one_of([value(a) for a in actions if a.option_strings and not a.required]), max_size=3)
        whole = st.tuples(st.tuples(*needed), rest).map(lambda p: [name, *sum(p[0], []), *sum(p[1], [])])
        quick = ["--n-samples=2", "--seq-len=8"] if name in ("quantize", "compare") else []
        return st.one_of(
            whole.map(lambda words: [*words, *quick]), whole, st.lists(places, max_size=3).map(lambda w: [name, *w])
        )

    return st.one_of([line(name) for name in commands] + [st.lists(places, max_size=3)])


def call(words_: list[str], folder: Path) -> None:  # noqa: ARG001
    """As `main` does, without its net for errors: what it would have printed is judged here."""
    args = build_parser().parse_args([*words_, "--quiet"] if words_ else [])
    with quiet_libraries(True):
        code = command_named(args.command)(args)
    if code:
        raise ValueError(f"the command finished with code {code}, which says that a preset failed")


SURFACES = {
    "freeact.config": Surface(arguments, construct),
    "freeact.data": Surface(data, read),
    "freeact.weights": Surface(seeds, load_damaged_weights, _save),
    "freeact.checkpoint_config": Surface(seeds, load_damaged_config, _save),
    "freeact.command_line": Surface(_command_lines(), call, _sandbox, writes=True),
}
