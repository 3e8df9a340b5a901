"""`freeact` as a user runs it, through `main([...])`, on tiny models: results, files, wrong inputs, interruptions."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import optimum_freeact
from optimum_freeact import FreeActConfig
from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.cli import build_parser, main
from optimum_freeact.commands import folder as folders
from optimum_freeact.commands import options
from optimum_freeact.config_fields import DEFAULTS, RUNTIME
from optimum_freeact.modules.surgery import quantized_linears
from optimum_freeact.presets import PRESETS
from optimum_freeact.report.evaluate import score_text, tokenize_windows
from tests.helpers.quantized import quantized
from tests.helpers.tiny_models import plant_outliers, plant_sink, tiny, tiny_tokenizer


TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, 0123456789 times! "
OTHER = "Sphinx of black quartz, judge my vow: how vexingly quick daft zebras jump. "
SMALL = ["--n-samples", "4", "--seq-len", "32", "--batch-size", "2", "--quiet"]
WINDOWS = ["--window", "32", "--tokens", "256", "--quiet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, two texts and a quantized model."""
    home = tmp_path_factory.mktemp("cli")
    model = tiny("llama")
    plant_outliers(model)
    plant_sink(model)
    model.save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT * 20)
    (home / "other.txt").write_text(OTHER * 20)
    assert main(["quantize", *paths(home, "model", "w4a4"), "--dataset", str(home / "text.txt"), *SMALL]) == 0
    return home


def paths(home, *names):
    return [str(home / name) for name in names]


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fails(capsys, *words):
    """The command line exits with 2 and says one line."""
    capsys.readouterr()
    assert main(list(words)) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    assert err.startswith("freeact")
    return err


def test_without_a_command_it_shows_them(capsys):
    assert main([]) == 2
    assert "quantize" in capsys.readouterr().err


def test_a_name_that_is_neither_here_nor_on_the_hub(capsys):
    assert "'absent-model' is no folder here, and the hub did not give such a model" in fails(
        capsys, "inspect", "absent-model"
    )


# --- quantize ----------------------------------------------------------------------------------------------------


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


# --- wrong inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight-bits", "3"], "weight_bits must be one of [4, 8, 16], got 3"),
        (["--weight-bits", "four"], "invalid int value: 'four'"),
        (["--preset", "best"], "preset must be one of"),
        (["--transform", "fourier"], "transform must be one of"),
        (["--activation-clip", "wide"], "activation_clip must be 'search' or a number"),
        (["--weight-group-size", "48"], "weight_group_size=48 does not divide in_features=64"),
        (["--preset", "flatquant", "--transform", "none"], "learns Kronecker factors"),
        (["--token-types", "text,nonsense"], "token_types must be"),
        (["--n-samples", "100000"], "Calibration needs n_samples * seq_len"),
        (["--n-samples", "0"], "n_samples must be an integer of at least 1"),
        (["--dataset", "missing.txt"], "missing.txt"),
        (["--dataset", "{home}/empty.txt"], "the data is empty"),
        (["--dataset", "{home}/bytes.txt"], "is no UTF-8 text"),
        (["--dataset", "{home}/wrong.jsonl"], "is not JSON"),
        (["--tokenizer", "{home}/nothing"], "No tokenizer could be loaded"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--modules-to-not-convert", "self_attn,mlp"], "No linear to quantize"),
        (["--surprise"], "quantize does not know --surprise"),
        (["--weight-bit-width", "3"], "does not know --weight-bit-width 3; did you mean --weight-bits?"),
    ],
)
def test_quantize_refuses_in_one_line_and_leaves_nothing(home, tmp_path, capsys, words, message):
    (home / "nothing").mkdir(exist_ok=True)
    (home / "empty.txt").write_text("")
    (home / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (home / "wrong.jsonl").write_text("{oops\n")
    words = [word.format(home=home) for word in words]
    start = ["quantize", str(home / "model"), str(tmp_path / "deep" / "q"), "--dataset", str(home / "text.txt")]
    assert message in fails(capsys, *start, *SMALL, *words)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("w4a4", "is quantized already (freeact)"),
        ("absent/model", "neither a folder here nor a model's name"),
        ("nothing", "holds no config.json"),
        ("nan", "holds NaN or inf"),
        ("cut", "truncated or damaged"),
        ("index", "model.safetensors.index.json' is truncated or damaged"),
        ("shards", "names ['model-00002-of-"),
        ("narrow", "has other shapes in 6 of the weights"),
        ("renamed", "lacks 1 of the weights that its config.json announces, the first are ['model.norm.weight']"),
    ],
)
def test_models_that_cannot_be_quantized(home, tmp_path, capsys, model, message):
    (home / "nothing").mkdir(exist_ok=True)
    if model in ("nan", "cut", "renamed", "narrow", "index", "shards"):
        shutil.copytree(home / "model", tmp_path / model)
        home = tmp_path
    if model == "nan":
        broken = AutoModelForCausalLM.from_pretrained(home / model)
        broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        broken.save_pretrained(home / model)
        message = "model.layers.1.mlp.up_proj"
    if model == "cut":
        file = home / model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    if model in ("index", "shards"):
        whole = AutoModelForCausalLM.from_pretrained(home / model)
        (home / model / "model.safetensors").unlink()
        whole.save_pretrained(home / model, max_shard_size="20KB")
        index = home / model / "model.safetensors.index.json"
        if model == "index":
            index.write_text(index.read_text()[:200])
        else:
            next((home / model).glob("model-00002-of-*")).unlink()
    if model == "renamed":  # one flipped bit in the header
        file = home / model / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.norm.weighu"'))
    if model == "narrow":
        config = json.loads((home / model / "config.json").read_text())
        (home / model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    words = ["quantize", str(home / model), str(tmp_path / "q"), "--dataset", str(text), *SMALL]
    assert message in fails(capsys, *words)
    assert not (tmp_path / "q").exists()
    assert not [name for name in tree(tmp_path) if name.startswith(".q-")]


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "missing.txt"], "'missing.txt' is no file here"),
        (["--tokens", "100000"], "Evaluation needs"),
        (["--tokens", "16"], "--tokens at least --window"),
        (["--window", "1000", "--tokens", "1000"], "longer than the model's 256 positions"),
        (["--window", "many"], "invalid int value"),
    ],
)
def test_evaluation_refuses_in_one_line(home, tmp_path, capsys, command, words, message):
    extra = ["--dataset", str(home / "text.txt"), "--out", str(tmp_path / "out"), "--n-samples", "4"]
    extra = [*extra, "--seq-len", "32"] if command == "compare" else []
    start = [command, str(home / "model"), "--text", str(home / "other.txt"), *WINDOWS, *extra]
    assert message in fails(capsys, *start, *words)
    assert tree(tmp_path) == []


def test_inspect_refuses_other_methods_newer_formats_and_damage(home, tmp_path, capsys):
    shutil.copytree(home / "w4a4", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())

    def rewrite(**changes):
        changed = {**config, "quantization_config": {**config["quantization_config"], **changes}}
        (tmp_path / "m" / "config.json").write_text(json.dumps(changed))

    rewrite(quant_method="gptq")
    assert "quantized with 'gptq'" in fails(capsys, "inspect", str(tmp_path / "m"))
    rewrite(format_version=99)
    assert "format version 99" in fails(capsys, "inspect", str(tmp_path / "m"))
    rewrite()
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "truncated or damaged" in fails(capsys, "inspect", str(tmp_path / "m"))
    assert "truncated or damaged" in fails(
        capsys, "evaluate", str(tmp_path / "m"), "--text", str(home / "other.txt"), *WINDOWS
    )


def test_traceback_is_there_for_those_who_ask(home, tmp_path):
    with pytest.raises(ValueError, match="preset must be one of"):
        main(["quantize", *paths(home, "model", "x"), "--dataset", "d", "--preset", "best", "--traceback"])


# --- where output goes -------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_ours(home, tmp_path, capsys):
    out = tmp_path / "q"
    words = ["quantize", str(home / "model"), str(out), "--dataset", str(home / "text.txt"), *SMALL, "--preset", "rtn"]
    out.mkdir()
    assert main(words) == 0  # an empty one is as good as none
    (out / "mark").write_text("earlier")
    assert "not empty" in fails(capsys, *words)
    assert (out / "mark").is_file()
    assert "No linear" in fails(capsys, *words, "--overwrite", "--modules-to-not-convert", "self_attn,mlp")
    assert (out / "mark").is_file()  # a failure leaves the earlier result
    assert main([*words, "--overwrite"]) == 0
    assert not (out / "mark").exists()
    assert tree(tmp_path) == ["q", *(f"q/{name}" for name in tree(out))]

    other = tmp_path / "letters"
    other.mkdir()
    (other / "to_mother.txt").write_text("dear")
    words[2] = str(other)
    assert "no earlier result" in fails(capsys, *words, "--overwrite")
    assert (other / "to_mother.txt").is_file()
    words[2] = str(other / "to_mother.txt")
    assert "is no folder" in fails(capsys, *words)


def test_the_model_itself_is_never_replaced(home, tmp_path, capsys):
    shutil.copytree(home / "model", tmp_path / "m")
    before = tree(tmp_path)
    words = ["--dataset", str(home / "text.txt"), *SMALL, "--overwrite"]
    assert "in use" in fails(capsys, "quantize", str(tmp_path / "m"), str(tmp_path / "m"), *words)
    (tmp_path / "config.json").write_text("{}")
    assert "in use" in fails(capsys, "quantize", str(tmp_path / "m"), str(tmp_path), *words)
    assert tree(tmp_path) == sorted([*before, "config.json"])


def test_a_full_disk_leaves_nothing(home, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    words = ["quantize", str(home / "model"), str(tmp_path / "q"), "--dataset", str(home / "text.txt"), *SMALL]
    assert "No space left on device" in fails(capsys, *words)
    assert tree(tmp_path) == []


def test_an_earlier_result_comes_back_when_the_last_step_fails(tmp_path, monkeypatch):
    out = tmp_path / "q"
    out.mkdir()
    (out / "config.json").write_text("{}")
    rename = folders.Path.rename

    def fail_on_new(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(folders.Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"), folders.new_folder(out) as fresh:
        (fresh / "config.json").write_text("[]")
    assert tree(tmp_path) == ["q", "q/config.json"]
    assert (out / "config.json").read_text() == "{}"


def test_json_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        folders.write_json(tmp_path / "x.json", {"nll": float("nan")})
    assert tree(tmp_path) == []


# --- interruption ------------------------------------------------------------------------------------------------


def test_an_interrupted_calibration_resumes_to_the_same_bits(home, tmp_path, capsys, monkeypatch):
    words = ["--dataset", str(home / "text.txt"), *SMALL, "--resume-dir", str(tmp_path / "blocks")]
    save = BlockStore.save

    def save_then_stop(self, index, block):
        save(self, index, block)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", save_then_stop)
        assert main(["quantize", *paths(home, "model"), str(tmp_path / "q"), *words]) == 130
    said = capsys.readouterr().err
    assert "run the same command again" in said
    assert str(tmp_path / "blocks") in said
    assert sorted(tree(tmp_path / "blocks")) == ["block-0000.safetensors", "fingerprint.txt"]
    assert not (tmp_path / "q").exists()

    fitted = []
    monkeypatch.setattr(BlockStore, "save", lambda self, i, block: (fitted.append(i), save(self, i, block)))
    assert main(["quantize", *paths(home, "model"), str(tmp_path / "q"), *words]) == 0
    assert fitted == [1]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (home / "w4a4", tmp_path / "q"))
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (
        json.loads((folder / "config.json").read_text())["quantization_config"]["calibration_record"]["output_error"]
        for folder in (home / "w4a4", tmp_path / "q")
    )
    assert first == second

    assert "another model, calibration set or config" in fails(
        capsys, "quantize", *paths(home, "model"), str(tmp_path / "r"), *words, "--seed", "1"
    )


def ctrl_c(*_args, **_kwargs):
    raise KeyboardInterrupt


def end_of_the_job(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


@pytest.mark.parametrize("stop", [ctrl_c, end_of_the_job])
def test_an_interruption_without_a_resume_dir_says_how_to_have_one(home, tmp_path, capsys, monkeypatch, stop):
    before = signal.getsignal(signal.SIGTERM)

    monkeypatch.setattr("optimum_freeact.calibration.blockwise._quantize_block", stop)
    words = ["--dataset", str(home / "text.txt"), *SMALL]
    assert main(["quantize", *paths(home, "model"), str(tmp_path / "q"), *words]) == 130
    assert "--resume-dir" in capsys.readouterr().err
    assert tree(tmp_path) == []
    monkeypatch.setattr("optimum_freeact.commands.evaluate.score", stop)
    assert main(["evaluate", *paths(home, "model"), "--text", str(home / "other.txt"), *WINDOWS]) == 130
    assert "Nothing was written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


# --- evaluate, inspect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model", "w4a4"])
def test_evaluate_agrees_with_the_library(home, tmp_path, capsys, model):
    words = ["--text", str(home / "other.txt"), *WINDOWS, "--json", str(tmp_path / "new" / "e.json")]
    assert main(["evaluate", str(home / model), *words]) == 0
    found = json.loads((tmp_path / "new" / "e.json").read_text())
    windows = tokenize_windows(OTHER * 20, tiny_tokenizer(), 32, 8)
    expected = score_text(AutoModelForCausalLM.from_pretrained(home / model), windows)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert found["n_tokens"] == expected.n_tokens == 8 * 31
    assert (found["model"], found["text"], found["dtype"]) == (model, "other.txt", "float32")
    assert (found["quantization"] or {}).get("weight_bits") == (4 if model == "w4a4" else None)
    assert f"{found['perplexity']:.3f}" in capsys.readouterr().out
    assert tree(tmp_path) == ["new", "new/e.json"]


def test_inspect_counts_the_bytes_that_are_in_the_file(home, tmp_path, capsys):
    assert main(["inspect", str(home / "w4a4"), "--json", str(tmp_path / "i.json")]) == 0
    found = json.loads((tmp_path / "i.json").read_text())
    tensors = load_file(home / "w4a4" / "model.safetensors")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    ours = sum(size for name, size in sizes.items() if "proj" in name)
    assert found["quantized"] is True
    assert found["size"]["stored_bytes"] == ours == sum(kind["stored_bytes"] for kind in found["kinds"])
    assert sum(rest["n_bytes"] for rest in found["rest"]) == sum(sizes.values()) - ours
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    assert (found["size"]["n_weights"], found["size"]["bf16_bytes"]) == (weights, 2 * weights)
    assert found["ratio"] == pytest.approx(ours / (2 * weights))
    assert len(found["record"]["output_error"]) == found["n_blocks"] == 2
    shown = capsys.readouterr().out
    for words in ("embed_tokens", "lm_head", "embeddings, head", "On cpu runs", "because", "preset freeact"):
        assert words in shown
    assert f"{found['record']['output_error'][1]:.3g}" in shown


def test_inspect_of_a_full_precision_model_says_what_would_be_quantized(home, capsys):
    assert main(["inspect", str(home / "model")]) == 0
    shown = capsys.readouterr().out
    assert "not quantized; this is what would be" in shown
    assert "lm_head" in shown
    assert "On cpu runs" not in shown


def test_inspect_reports_experts(tmp_path, capsys):
    tiny("qwen3_moe").save_pretrained(tmp_path / "moe")
    assert main(["inspect", str(tmp_path / "moe")]) == 0
    shown = capsys.readouterr().out
    assert "mlp.experts.gate_up_proj" in shown
    assert "4 x 64 x 64" in shown  # experts, outputs of gate and up, inputs
    assert "3-D parameters" not in shown
    quantized("qwen3_moe").save_pretrained(tmp_path / "quantized")
    assert main(["inspect", str(tmp_path / "quantized")]) == 0
    shown = capsys.readouterr().out
    assert "mlp.experts.gate_up_proj" in shown
    assert "mlp.experts.gate_up_proj_input" in shown
    assert "3-D parameters" not in shown


# --- compare -----------------------------------------------------------------------------------------------------


def test_compare_writes_table_json_markdown_and_figure(home, tmp_path, capsys):
    words = ["--dataset", str(home / "text.txt"), "--text", str(home / "other.txt"), *WINDOWS, *SMALL]
    words += ["--presets", "rtn,freeact", "--schemes", "W4A4,w8a8kv8", "--out", str(tmp_path / "report")]
    assert main(["compare", str(home / "model"), *words]) == 0
    shown = capsys.readouterr().out
    assert tree(tmp_path) == ["report", *(f"report/comparison.{end}" for end in ("json", "md", "png"))]
    page = (tmp_path / "report" / "comparison.md").read_text()
    assert all(heading in text for heading in ("perplexity", "size", "seconds") for text in (shown, page))
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    rows = found["rows"]
    assert [(row["scheme"], row["preset"]) for row in rows] == [
        ("float32", "full precision"),
        ("W4A4", "rtn"),
        ("W4A4", "freeact"),
        ("W8A8KV8", "rtn"),
        ("W8A8KV8", "freeact"),
    ]
    for row in rows:
        assert f"{row['nll']:.4f}" in shown
        assert f"{row['perplexity']:.2f}" in shown
        assert f"{row['perplexity']:.2f}" in page
        assert row["excess"] == pytest.approx(row["nll"] - rows[0]["nll"])
    assert rows[1]["size_ratio"] < rows[3]["size_ratio"]
    assert rows[1]["output_error"][-1] > rows[2]["output_error"][-1]
    assert abs(rows[3]["excess"]) < abs(rows[1]["excess"])
    assert str(home) not in json.dumps(found)

    library = AutoModelForCausalLM.from_pretrained(home / "w4a4")
    expected = score_text(library, tokenize_windows(OTHER * 20, tiny_tokenizer(), 32, 8))
    assert rows[2]["nll"] == pytest.approx(expected.nll, rel=1e-6)  # the same settings as the saved model


def test_bars_say_block_error_and_time_left(home, tmp_path, capsys):
    loud = [word for word in SMALL if word != "--quiet"]
    words = [*paths(home, "model"), str(tmp_path / "q"), "--dataset", str(home / "text.txt"), *loud]
    assert main(["quantize", *words]) == 0
    bar = capsys.readouterr().err.replace("\r", "\n")
    assert "Calibrating W4A4" in bar
    assert "2/2" in bar  # blocks
    errors = re.findall(r"output_error=(\d\.\d+)", bar)
    record = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["calibration_record"]
    assert float(errors[-1]) == pytest.approx(record["output_error"][-1], abs=1e-4)
    assert re.search(r"[12]/2 \[\d\d:\d\d<\d\d:\d\d", bar)  # gone and left; a bar skips a block that is done at once
    assert main(["evaluate", *paths(home, "model"), "--text", str(home / "other.txt"), *WINDOWS[:-1]]) == 0
    assert re.search(r"8/8 .*nll=\d", capsys.readouterr().err)


def test_compare_resumes_what_was_calibrated(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_freeact.report.plots.available", lambda: False)  # drawing takes longest
    words = ["--dataset", str(home / "text.txt"), "--text", str(home / "other.txt"), *WINDOWS, *SMALL]
    words += ["--presets", "rtn", "--schemes", "W4A16,W4A4", "--resume-dir", str(tmp_path / "blocks")]
    save = BlockStore.save

    def stop_at_the_second(self, index, block):
        save(self, index, block)
        if self.folder.name == "rtn-W4A4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", stop_at_the_second)
        assert main(["compare", str(home / "model"), *words, "--out", str(tmp_path / "r")]) == 130
    assert not (tmp_path / "r").exists()
    fitted = []
    monkeypatch.setattr(BlockStore, "save", lambda self, i, _block: fitted.append((self.folder.name, i)))
    assert main(["compare", str(home / "model"), *words, "--out", str(tmp_path / "r")]) == 0
    assert fitted == [("rtn-W4A4", 1)]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schemes", "4bit"], "--schemes must be like"),
        (["--schemes", "W3A4"], "weight_bits must be one of"),
        (["--presets", "rtn,best"], "preset must be one of"),
        (["--presets", ","], "Name at least one preset"),
        (["--n-samples", "100000"], "Calibration needs"),
    ],
)
def test_compare_refuses_before_any_work(home, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("optimum_freeact.commands.compare.load_model", lambda *_: pytest.fail("a model was loaded"))
    start = ["--dataset", str(home / "text.txt"), "--text", str(home / "other.txt"), *WINDOWS, *SMALL]
    start += ["--out", str(tmp_path / "r")]
    assert message in fails(capsys, "compare", str(home / "model"), *start, *words)
    assert tree(tmp_path) == []


def test_compare_goes_on_when_one_preset_cannot(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_freeact.report.plots.available", lambda: False)  # drawing takes longest
    from optimum_freeact.commands import compare

    real = compare.quantize

    def refuse_rtn(model, config):
        if config.preset == "rtn":
            raise ValueError("rtn cannot\ndo it")
        return real(model, config)

    monkeypatch.setattr(compare, "quantize", refuse_rtn)
    words = ["--dataset", str(home / "text.txt"), "--text", str(home / "other.txt"), *WINDOWS, *SMALL]
    start = ["compare", str(home / "model"), *words, "--schemes", "W4A4"]
    assert main([*start, "--presets", "rtn,quarot", "--out", str(tmp_path / "r")]) == 1
    rows = json.loads((tmp_path / "r" / "comparison.json").read_text())["rows"]
    assert (rows[1]["nll"], rows[1]["note"]) == (None, "rtn cannot do it")
    assert rows[2]["nll"] is not None
    assert "rtn cannot do it" in (tmp_path / "r" / "comparison.md").read_text()
    assert "No preset could be measured" in fails(capsys, *start, "--presets", "rtn", "--out", str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_compare_without_matplotlib_says_so(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_freeact.report.plots.available", lambda: False)
    words = ["--dataset", str(home / "text.txt"), "--text", str(home / "text.txt"), *WINDOWS, *SMALL]
    words += ["--presets", "rtn", "--schemes", "W4A4", "--out", str(tmp_path / "r")]
    assert main(["compare", str(home / "model"), *words]) == 0
    assert tree(tmp_path / "r") == ["comparison.json", "comparison.md"]
    shown = capsys.readouterr().out
    assert "no figure" in shown
    assert "the same file" in shown


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
