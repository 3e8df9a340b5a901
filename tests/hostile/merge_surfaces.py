"""Ways into mergekit_ot: recipes, texts, checkpoints, plan bundles, command lines."""

import functools
import json
import shutil
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ot.bundle import load_bundle
from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.cli import cli
from mergekit_ot.compatibility import compare
from mergekit_ot.pipeline import merge_recipe, plan_recipe
from mergekit_ot.planning import open_pair
from mergekit_ot.recipe import FLAT_CALIBRATION, load_recipe, parse_recipe
from mergekit_ot.settings import Calibration, PlanSettings
from mergekit_ot.texts import read_texts
from tests.hostile.inputs import anything, damaged_json, damaged_safetensors, mapping, nasty_paths, numbers, words
from tests.hostile.surfaces import Changed, Surface
from tests.merge.tiny import build, save, texts, write_texts


small = st.integers(-1, 600)
alpha = st.recursive(
    st.one_of(numbers, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries({"value": inner}, optional={"filter": words, "x": anything}),
        st.lists(st.fixed_dictionaries({"value": inner}, optional={"filter": words}), max_size=2),
    ),
    max_leaves=4,
)
calibration = {
    "dataset": st.one_of(st.just("texts.txt"), nasty_paths),
    "samples": small,
    "rows": small,
    "max_length": small,
    "text_key": words,
    "seed": small,
}
parameters = {
    "donor": st.one_of(st.just("donor"), nasty_paths),
    "alpha": alpha,
    "plan": st.one_of(st.just("plans"), nasty_paths),
    "gate": st.sampled_from(["close", "scale", "off", True]),
    "min_confidence": numbers,
    "control": st.sampled_from(["none", "shrink", "plain", "off", 1]),
    "preset": st.sampled_from(["structured", "paper", "paper-released", "best"]),
    "residual_map": st.sampled_from(["ot", "signed", "procrustes", "auto", None]),
    "solver": st.sampled_from(["hard", "entropic", "unbalanced", "auto", 0]),
    "reg": st.one_of(st.just("auto"), numbers),
    "layer_map": st.one_of(st.sampled_from(["monotone", "0:0", "0:1,1:0", "0:0,1:9", "a:b", "0-0"]), words),
    "modules": st.one_of(st.sampled_from(["attn", "mlp", "attn,mlp", "attn,attn", ""]), st.lists(words, max_size=2)),
    "embeddings": st.sampled_from(["keep", "shared", "all"]),
    **{name: calibration[name.removeprefix("calibration_")] for name in FLAT_CALIBRATION},
}
models = st.one_of(
    *[st.just([{"model": "target"}, {"model": "donor"}])] * 5,
    st.just([{"model": "donor"}]),
    st.lists(
        st.fixed_dictionaries({"model": st.one_of(st.sampled_from(["target", "donor"]), nasty_paths)}), max_size=3
    ),
    st.lists(anything, max_size=2),
    anything,
)
recipes = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["transport"] * 9 + ["linear", None]),
        "base_model": st.one_of(*[st.just("target")] * 8, nasty_paths, anything),
        "models": models,
        "calibration": st.one_of(
            mapping(calibration).map(lambda m: {"dataset": "texts.txt"} | m), mapping(calibration)
        ),
    },
    optional={
        "parameters": st.one_of(mapping(parameters), mapping(parameters), anything),
        "dtype": st.sampled_from(["float32", "bfloat16", "int4", 7]),
        "out_dtype": st.sampled_from(["float32", "float16", "x"]),
        "chat_template": st.one_of(st.sampled_from(["auto", "chatml", "{{ x }}"]), nasty_paths, anything),
        "tokenizer_source": words,
    },
)


def parse(document, folder: Path) -> None:
    """What our reader accepts, mergekit's schema accepts too."""
    recipe = parse_recipe(document, folder=folder)
    MergeConfiguration.model_validate(recipe.to_mergekit("plans"))


def _yaml_texts() -> st.SearchStrategy[bytes]:
    tags = [
        "!!python/object/apply:os.system ['touch escape']",
        "!!python/name:os.system",
        "&a [*a]",
        "{<<: 1}",
        "? x",
        "--- a\n--- b",
    ]
    dumped = recipes.map(lambda recipe: yaml.safe_dump(recipe, allow_unicode=True))
    tagged = st.tuples(st.sampled_from(["base_model", "models", "calibration"]), st.sampled_from(tags)).map(
        lambda p: f"merge_method: transport\n{p[0]}: {p[1]}\n"
    )
    cut = st.tuples(dumped, st.integers(0, 400)).map(lambda p: p[0][: p[1]])
    return st.one_of(cut, tagged, st.sampled_from(tags), words).map(
        lambda t: t.encode("utf-8", "replace")
    ) | st.binary(max_size=40)


def load_yaml(text: bytes, folder: Path) -> None:
    """A file of any content is a recipe or an error; nothing in it is run."""
    (folder / "recipe.yml").write_bytes(text)
    try:
        load_recipe(folder / "recipe.yml")
    finally:
        if (folder / "escape").exists():
            raise Changed("YAML ran a program")


lines = st.one_of(
    words, anything.map(json.dumps), st.fixed_dictionaries({"text": anything}).map(json.dumps), st.just("word " * 12)
)
files = st.tuples(
    st.sampled_from([".txt", ".jsonl"]),
    st.one_of(st.lists(lines, max_size=4).map(lambda rows: "\n".join(rows).encode("utf-8")), st.binary(max_size=60)),
    st.one_of(st.just("text"), words),
)


def read(case, folder: Path) -> None:
    """Texts that come back are long enough."""
    suffix, content, key = case
    (folder / f"data{suffix}").write_bytes(content)
    found = read_texts(Calibration(f"data{suffix}", text_key=key), folder)
    if not found or min(map(len, found)) < 40:
        raise Changed("short texts came back")


# ---------------------------------------------------------------- checkpoints and plans
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
OPTIONS = MergeOptions(quiet=True)
seeds = st.integers(0, 2**32)


def prepare_pair(folder: Path) -> None:
    """Two tiny models, texts and a recipe."""
    for seed, name in enumerate(("target", "donor")):
        save(build(seed=seed, **SIZES), folder / name)
    write_texts(folder / "texts.txt", texts(40))
    recipe = {
        "merge_method": "transport",
        "base_model": "target",
        "models": [{"model": "donor"}],
        "parameters": {"alpha": 0.5, "gate": "off"},
        "calibration": {"dataset": "texts.txt", "rows": 100, "max_length": 64},
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))


@functools.cache
def _whole(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "donor")
    return {name: reader(name) for name in reader.names()}


def open_damaged(seed: int, folder: Path) -> None:
    """A pair with a damaged donor is refused, or all tensors are those that were saved."""
    expected, place = _whole(folder), folder / "damaged"
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(folder / "donor", place)
    if seed % 2:
        path = place / "config.json"
        path.write_text(damaged_json(path.read_text(), seed, ("rope_parameters",)))
    else:
        path = place / "model.safetensors"
        path.write_bytes(damaged_safetensors(path.read_bytes(), seed))
    pair = open_pair(str(folder / "target"), str(place))
    compare(pair, PlanSettings())
    reader = CheckpointReader(place)
    for name, tensor in expected.items():
        if not torch.equal(reader(name), tensor):
            raise Changed(f"another tensor {name}")


def prepare_plans(folder: Path) -> None:
    """A pair with its plans."""
    prepare_pair(folder)
    plan_recipe(load_recipe(folder / "recipe.yml"), folder / "whole", quiet=True)


@functools.cache
def _plans(folder: Path) -> dict[str, torch.Tensor]:
    return load_bundle(folder / "whole").tensors


def load_plans(seed: int, folder: Path) -> None:
    """Damaged plans are refused, or equal those that were saved."""
    expected, place = _plans(folder), folder / "plans"
    place.mkdir(exist_ok=True)
    for name in ("plans.json", "plans.safetensors"):
        shutil.copy(folder / "whole" / name, place / name)
    if seed % 3 == 0:
        (place / "plans.json").write_text(damaged_json((place / "plans.json").read_text(), seed, ("widths", "target")))
    else:
        (place / "plans.safetensors").write_bytes(
            damaged_safetensors((place / "plans.safetensors").read_bytes(), seed)
        )
    found = load_bundle(place).tensors
    if seed % 3 and (set(found) != set(expected) or not all(torch.equal(found[n], expected[n]) for n in found)):
        raise Changed("other plans")
    if seed % 3 == 0:
        recipe = load_recipe(folder / "recipe.yml")
        recipe = parse_recipe({"merge_method": "transport", "base_model": recipe.target, "models": [{"model": recipe.donor}],
                               "parameters": {"plan": str(place), "gate": "close"}})  # fmt: skip
        merge_recipe(recipe, folder / "out", OPTIONS)
        shutil.rmtree(folder / "out")


# ---------------------------------------------------------------- command line
def sandbox(folder: Path) -> None:
    """What command lines can name."""
    prepare_plans(folder)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "text.tex").write_text("years of work")
    (folder / "broken.yml").write_text("merge_method: [")
    (folder / "other.yml").write_text(yaml.safe_dump({"merge_method": "transport", "base_model": "target"}))


places = st.one_of(
    st.sampled_from(["recipe.yml", "recipe.yml", "broken.yml", "other.yml", "target", "whole", "thesis", "texts.txt", "out", "deep/out"]),
    nasty_paths.filter(lambda path: "\0" not in path),
)  # fmt: skip


def _command_lines() -> st.SearchStrategy[list[str]]:
    def value(parameter) -> st.SearchStrategy[list[str]]:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        if not flags:
            return places.map(lambda text: [text])
        if getattr(parameter, "is_flag", False):
            return st.just([flags[0]])
        fitting = numbers.map(str) if "INT" in str(parameter.type.name).upper() else places
        return st.one_of(fitting, words).map(lambda text: [f"{flags[0]}={text}"])

    def line(name: str) -> st.SearchStrategy[list[str]]:
        parameters_ = cli.commands[name].params
        needed = [value(p) for p in parameters_ if p.param_type_name == "argument"]
        options = [p for p in parameters_ if p.param_type_name == "option" and p.name not in DANGEROUS]
        rest = st.lists(st.one_of([value(p) for p in options] or [st.just([])]), max_size=3)
        return st.tuples(st.tuples(*needed), rest).map(lambda p: [name, *sum(p[0], []), *sum(p[1], [])])

    return st.one_of([line(name) for name in cli.commands] + [st.lists(places, max_size=3)])


#: mergekit's options that start processes, change the process for good, or name a cache outside the sandbox.
DANGEROUS = ("multi_gpu", "num_threads", "transformers_cache", "lora_merge_cache", "random_seed", "help", "verbosity")


def call(words_: list[str], folder: Path) -> None:  # noqa: ARG001
    """As `main` does, without its net for errors."""
    cli.main(args=words_, prog_name="mergekit-ot", standalone_mode=False)


SURFACES = {
    "merge.recipe": Surface(recipes, parse),
    "merge.yaml": Surface(_yaml_texts(), load_yaml),
    "merge.texts": Surface(files, read),
    "merge.checkpoint": Surface(seeds, open_damaged, prepare_pair),
    "merge.plans": Surface(seeds, load_plans, prepare_plans),
    "merge.command_line": Surface(_command_lines(), call, sandbox, writes=True),
}
