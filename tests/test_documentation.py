"""The documentation: it builds strictly, its commands and recipes are read by the programs, its first pages are run."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_layering import PACKAGES, ROOT
from tools.site import ADOPTED, homes, relink


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


# ---------------------------------------------------------------- the site
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_entry(site, package):
    html = (site / "api" / package / "index.html").read_text()
    offered = set(importlib.import_module(package).__all__)
    assert set(homes(package)) == offered
    for name, module in homes(package).items():
        assert f'id="{module}.{name}"' in html, name


def test_no_reference_is_left_in_brackets(site):
    """`[`Name`]`, transformers' way to refer to a name, is a link or plain code on every page."""
    for page in site.rglob("index.html"):
        assert not re.search(r"\[<code>", page.read_text()), page


def test_internal_links_of_the_built_site_lead_somewhere(site):
    missing = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # served anywhere, so its links are absolute
            continue
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if "://" not in target and not target.startswith(("data:", "mailto:", "javascript:")):
                if not (page.parent / target).exists():
                    missing.append(f"{page.relative_to(site)}: {target}")
    assert missing == []


def test_links_between_repository_and_site():
    pages = {"index.md", "how-to/data.md", "freeact.md", *ADOPTED.values()}
    assert relink("[a](../README.md#install)", "docs/index.md", pages) == "[a](readme.md#install)"
    assert relink("[a](docs/freeact.md)", "README.md", pages) == "[a](freeact.md)"
    assert relink("![a](docs/figures/x.svg)", "README.md", pages) == "![a](figures/x.svg)"
    assert relink("[a](../../CHANGELOG.md)", "docs/how-to/data.md", pages) == "[a](../changelog.md)"
    assert relink("[a](LICENSE) [b](https://x.org)", "README.md", pages) == "a (`LICENSE`) [b](https://x.org)"
    assert relink("[a](no-such.md)", "docs/index.md", pages) == "[a](no-such.md)"  # for mkdocs to complain of
    assert relink("```\n[a](../README.md)\n```", "docs/index.md", pages) == "```\n[a](../README.md)\n```"


# ---------------------------------------------------------------- commands and recipes
def parse(words: list[str]) -> None:
    """Raise unless the program would understand the command."""
    program, *rest = words
    if program == "freeact":
        from optimum_freeact.cli import build_parser

        build_parser().parse_args(rest)
    elif program == "mergekit-ot":
        from mergekit_ot.cli import cli

        cli.commands[rest[0]].make_context(rest[0], rest[1:])
    elif program == "trl-mlc":
        from trl import ModelConfig, TrlParser

        from trl_mlc import cli
        from trl_mlc.dpo import MLCDPOConfig

        kinds = {"evaluate": (cli.EvaluateOptions,), "scan": (cli.ScanOptions,)}
        words = [word for word in rest[1:] if word != "--config" and not word.endswith(".yaml")]
        needed = [] if "--dataset_name" in words else ["--dataset_name", "rows.jsonl"]
        TrlParser(kinds.get(rest[0], (cli.TrainOptions, MLCDPOConfig, ModelConfig))).parse_args_and_config(
            words + needed
        )
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
    elif program in ("python", "accelerate", "torchrun"):
        for word in rest:
            if word.endswith(".py") or word.startswith("examples/"):
                assert (ROOT / word).exists(), word
        module = rest[rest.index("-m") + 1] if "-m" in rest else "json"
        assert importlib.util.find_spec(module) is not None, module
    else:
        assert program in ("pip", "npm", "git"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for words in command_lines(page):
        try:
            parse([word for word in words if word != "..."])
        except SystemExit as stop:
            pytest.fail(f"{' '.join(words)}: exit {stop.code}")


def test_commands_that_are_not_understood_are_seen():
    with pytest.raises(SystemExit):
        parse(["freeact", "quantise", "model"])
    with pytest.raises(AssertionError):
        parse(["make", "no-such-target"])
    with pytest.raises(ValueError, match="no_such"):
        parse(["trl-mlc", "scan", "--no_such", "1"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_and_configs_are_understood(page):
    from mergekit_ot.recipe import parse_recipe
    from trl_mlc.cli import TrainOptions
    from trl_mlc.dpo import MLCDPOConfig

    for text in blocks(page, "yaml"):
        document = yaml.safe_load(text)
        if "merge_method" in document:
            parse_recipe(document)
        else:
            known = {f.name for kind in (TrainOptions, MLCDPOConfig) for f in dataclasses.fields(kind)}
            assert set(document) <= known | {"model_name_or_path", "use_peft", "dtype"}


# ---------------------------------------------------------------- the first pages, run as they are
def run_page(page: Path, folder: Path, changes: dict[str, str]) -> list[str]:
    """Run all code of a page in its order, in this process; returns the commands run."""
    text = page.read_text()
    for old, new in changes.items():
        assert old in text, f"{page.name} no longer says {old!r}"
        text = text.replace(old, new)
    done = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(body, str(page), "exec"), {"__name__": "__page__"})
        elif language == "yaml":
            (folder / "recipe.yml").write_text(body)
        elif language == "sh":
            for words in map(shlex.split, body.splitlines()):
                if words and words[0] != "pip":
                    from mergekit_ot.cli import main as merge
                    from optimum_freeact.cli import main as freeact
                    from trl_mlc.cli import main as mlc

                    assert {"freeact": freeact, "trl-mlc": mlc, "mergekit-ot": merge}[words[0]](words[1:]) == 0
                    done.append(" ".join(words[:2]))
    return done


@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_of_quantizing_runs(tmp_path, monkeypatch):
    from tests.helpers.tiny_models import tiny, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    tiny("llama", max_position_embeddings=2048).save_pretrained("path/to/model")
    tiny_tokenizer().save_pretrained("path/to/model")
    for name in ("texts.txt", "held-out.txt"):
        Path(name).write_text("Optimal transport moves masses from one place to another, and no further.\n" * 400)
    done = run_page(
        ROOT / "docs" / "start" / "quantize.md", tmp_path, {'("path/to/model", quant': '("path/to/model", quant'}
    )
    assert done == ["freeact quantize", "freeact inspect", "freeact evaluate"]
    assert (tmp_path / "model-w4a4" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_of_aligning_runs(tmp_path, monkeypatch):
    from tests.mlc.conftest import byte_tokenizer, rows, tiny_llama

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    tiny_llama(byte_tokenizer()).save_pretrained("path/to/model")
    byte_tokenizer().save_pretrained("path/to/model")
    table = rows(8)
    lines = "".join(json.dumps({name: table[name][i] for name in table}) + "\n" for i in range(8))
    for name in ("rows.jsonl", "held-out.jsonl"):
        Path(name).write_text(lines)
    done = run_page(ROOT / "docs" / "start" / "align.md", tmp_path, {"max_steps=200": "max_steps=2"})
    assert done == ["trl-mlc evaluate", "trl-mlc evaluate"]
    assert (tmp_path / "change.png").is_file()


@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_of_merging_runs(tmp_path, monkeypatch):
    from tests.merge.tiny import build, save, texts, write_texts

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("target", "donor")):
        save(build(seed=seed), tmp_path / "path" / "to" / name)
    write_texts(tmp_path / "texts.txt", texts(700, length=12))
    done = run_page(
        ROOT / "docs" / "start" / "merge.md",
        tmp_path,
        {"eval recipe.yml merged": "eval recipe.yml merged --max-tokens 512"},
    )
    assert done == ["mergekit-ot check", "mergekit-ot run", "mergekit-ot eval"]
    assert (tmp_path / "merged.report" / "report.md").is_file()


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_teaching_runs(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.merge.tiny import build, save, texts

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    model = build()
    save(model, tmp_path / "path" / "to" / "target")
    save(
        build("qwen2", seed=5, vocab_size=400, hidden_size=48, num_attention_heads=6),
        tmp_path / "path/to/donor",
        vocab_size=400,
    )
    (tmp_path / "texts.txt").write_text("\n\n".join(texts(6, seed=9)))
    changes = {"max_steps=60": "max_steps=2, report_to='none', use_cpu=True, bf16=False", "samples=4": "samples=2"}
    run_page(ROOT / "docs" / "how-to" / "teach.md", tmp_path, changes)
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "taught", dtype=torch.float32)
    assert not torch.equal(taught.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_figures_of_the_concept_pages_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from tools.figures import FIGURES, FOLDER, main

    main([], folder=tmp_path)
    for name in FIGURES:
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        assert (FOLDER / f"{name}.svg").is_file(), "run python -m tools.figures"
