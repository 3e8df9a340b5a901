"""Wrong inputs of every command: one line, exit code 2, nothing left behind."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from optimum_freeact.cli import main
from tests.freeact.cli.words import SMALL, TEXT, WINDOWS, fails, paths, tree


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
