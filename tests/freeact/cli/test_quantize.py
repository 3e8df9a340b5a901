"""`freeact quantize` as a user runs it, on tiny models: what it writes, its options and its help."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import optimum_freeact
from optimum_freeact import FreeActConfig
from optimum_freeact.cli import build_parser, main
from optimum_freeact.commands import options
from optimum_freeact.config_fields import DEFAULTS, RUNTIME
from optimum_freeact.modules.surgery import quantized_linears
from optimum_freeact.presets import PRESETS
from tests.freeact.cli.words import SMALL, WINDOWS, fails, paths, tree


def test_without_a_command_it_shows_them(capsys):
    assert main([]) == 2
    assert "quantize" in capsys.readouterr().err


def test_a_name_that_is_neither_here_nor_on_the_hub(capsys):
    assert "'absent-model' is no folder here, and the hub did not give such a model" in fails(
        capsys, "inspect", "absent-model"
    )


def test_quantize_writes_a_model_that_loads_and_equals_the_library(home):
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(tree(home / "w4a4"))
    model = AutoModelForCausalLM.from_pretrained(home / "w4a4")
    assert len(quantized_linears(model)) == 14
    config = FreeActConfig(dataset=str(home / "text.txt"), n_samples=4, seq_len=32, batch_size=2, progress=False)
    library = AutoModelForCausalLM.from_pretrained(home / "model", quantization_config=config)
    ids = torch.arange(6, 30)[None]
    assert torch.equal(model(ids).logits, library(ids).logits)


def test_model_card_says_what_it_is_and_its_snippet_runs(home, monkeypatch):
    card = (home / "w4a4" / "README.md").read_text()
    assert "import optimum_freeact" in card
    assert "preset `freeact`" in card
    assert "`text.txt`" in card
    assert str(home) not in card
    errors = json.loads((home / "w4a4" / "config.json").read_text())["quantization_config"]["calibration_record"]
    for block, error in enumerate(errors["output_error"]):
        assert f"| {block} | {error:.3g} |" in card
    snippet = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(home)  # the snippet names the folder alone
    exec(compile(snippet.replace("max_new_tokens=64", "max_new_tokens=3"), "README.md", "exec"), {})


def test_settings_reach_the_saved_config(home, tmp_path):
    words = ["--preset", "quarot", "--weight-bits", "8", "--activation-symmetric", "--activation-clip", "search"]
    words += ["--modules-to-not-convert", "down_proj,o_proj", "--token-types", "text,sink", "--seed", "3"]
    data = ["--dataset", str(home / "text.txt")]
    assert main(["quantize", *paths(home, "model"), str(tmp_path / "q"), *data, *SMALL, *words]) == 0
    saved = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    expected = {"preset": "quarot", "weight_bits": 8, "activation_symmetric": True, "activation_clip": "search"}
    expected |= {"modules_to_not_convert": ["down_proj", "o_proj"], "token_types": ["text", "sink"], "seed": 3}
    assert {name: saved[name] for name in expected} == expected
    assert saved["rounding"] == "gptq"  # the preset's
    assert len(quantized_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))) == 10


def test_what_is_not_quantized_keeps_the_checkpoints_dtype(home, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    tokenizer = ["--tokenizer", str(home / "model"), "--dataset", str(home / "text.txt")]
    assert main(["quantize", str(tmp_path / "bf16"), str(tmp_path / "q"), *tokenizer, *SMALL]) == 0
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert tensors["model.layers.0.self_attn.q_proj.qscale"].dtype == torch.float32
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_setting_is_an_option_with_the_configs_own_words():
    fields = set(DEFAULTS) | {name for preset in PRESETS.values() for name in preset}
    assert set(options.settings()) == fields - set(RUNTIME)
    texts = options.help_texts()
    assert fields <= set(texts)
    assert texts["weight_bits"] == texts["activation_bits"] == "4, 8 or 16 (16: not rounded)."
    assert texts["damping"].startswith("Share of the mean diagonal")


def test_help_of_every_command(capsys):
    for words in (["--help"], *([name, "--help"] for name in ("quantize", "evaluate", "inspect", "compare"))):
        assert main(words) == 0
        assert "freeact" in capsys.readouterr().out
    main(["quantize", "--help"])
    shown = capsys.readouterr().out
    assert all(options.option_name(name) in shown for name in options.settings())


def test_versions_are_printed_and_name_what_a_bug_report_needs(capsys):
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"hf-concord {optimum_freeact.__version__} (torch {torch.__version__}")
    assert f"transformers {transformers.__version__}" in shown


def test_too_little_text_is_counted(home, capsys):
    (home / "short.txt").write_text("too short")
    said = fails(capsys, "evaluate", str(home / "model"), "--text", str(home / "short.txt"), *WINDOWS)
    assert "Evaluation needs 256 tokens, the text has " in said
    assert "skipping" not in said


def test_the_word_none_unsets_what_a_preset_sets():
    parser = build_parser()
    words = ["quantize", "m", "o", "--dataset", "d", "--low-rank", "4"]
    given = options.given_settings(
        parser.parse_args([*words, "--weight-group-size", "none", "--low-rank-budget", "None"])
    )
    assert given == {"weight_group_size": None, "low_rank_budget": None, "low_rank": 4}
    config = FreeActConfig(**given)
    assert (config.weight_group_size, config.activation_group_size) == (None, 16)
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--seed", "none"])
    assert (
        options.given_settings(parser.parse_args([*words, "--activation-group-size", "8"]))["activation_group_size"]
        == 8
    )


def test_a_group_size_that_is_no_number_is_refused(home, capsys):
    words = ["quantize", str(home / "model"), str(home / "no"), "--dataset", "d", "--weight-group-size", "few"]
    assert "argument --weight-group-size: invalid int value: 'few'" in fails(capsys, *words)
