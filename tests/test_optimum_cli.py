"""`optimum-cli freeact ...`: Optimum finds our commands by itself, and pays nothing for them while it runs others."""

import json
import subprocess

import pytest
from transformers import AutoConfig

import optimum_freeact  # noqa: F401 - so that the configuration of a quantized model is known
from tests.helpers import forked
from tests.helpers.quantized import fresh_python
from tests.helpers.tiny_models import tiny, tiny_tokenizer


pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
START = "from optimum.commands.optimum_cli import main; main()"


def optimum_cli(*words) -> subprocess.CompletedProcess:
    return forked.run(*map(str, words), code=START)


def test_it_is_listed_without_loading_torch():
    """Optimum loads every plug-in's file for each of its commands."""
    code = f"import sys\ntry:\n    {START}\nfinally:\n    print('optimum_freeact' in sys.modules, file=sys.stderr)"
    shown = fresh_python(code, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "freeact" in shown.stdout
    assert shown.stderr.split()[-1] == "False"


def test_it_quantizes_like_freeact(tmp_path):
    tiny("llama", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Optimal transport moves masses from one place to another.\n" * 200)
    words = ["--dataset", tmp_path / "text.txt", "--n-samples", "4", "--seq-len", "32", "--quiet"]
    done = optimum_cli("freeact", "quantize", tmp_path / "model", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert AutoConfig.from_pretrained(tmp_path / "out").quantization_config["preset"] == "freeact"
    again = optimum_cli("freeact", "inspect", tmp_path / "out", "--json", tmp_path / "found.json", "--quiet")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "found.json").read_text())


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path):
    wrong = optimum_cli(
        "freeact", "quantize", tmp_path / "no-model", tmp_path / "out", "--dataset", "no.txt", "--quiet"
    )
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert wrong.stderr.startswith("freeact quantize: error: ")
    assert optimum_cli("freeact", "quantise").returncode == 2
    assert not (tmp_path / "out").exists()
