"""The command line, on a tiny model and a file of rows."""

import json
from pathlib import Path

import pytest

from tests.mlc.conftest import rows
from trl_mlc.cli import main


@pytest.fixture
def data(tmp_path):
    table = rows(n=8)
    lines = (json.dumps(dict(zip(table, values, strict=True))) for values in zip(*table.values(), strict=True))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_dpo_from_yaml_then_evaluate_and_scan(tiny, data, tmp_path, capsys):
    config = tmp_path / "dpo.yaml"
    config.write_text(
        f"model_name_or_path: {tiny}\ndtype: float32\ndataset_name: {data}\noutput_dir: {tmp_path / 'out'}\n"
        "max_steps: 1\nper_device_train_batch_size: 2\nreport_to: none\nbf16: false\nuse_cpu: true\n"
        "mlc_weight: 0.5\nmlc_layer: 3\nmlc_extractor_dim: 8\nmlc_languages: [sw, bn]\n"
    )
    assert main(["dpo", "--config", str(config), "--learning_rate", "1e-4"]) == 0
    state = json.loads((tmp_path / "out" / "mlc_config.json").read_text())
    assert (state["layer"], state["languages"]) == (3, ["en", "bn", "sw"])

    shared = ["--dataset_name", data, "--dtype", "float32"]
    first, second = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    assert main(["evaluate", "--model_name_or_path", tiny, *shared, "--output", first]) == 0
    figure = str(tmp_path / "change.png")
    after = ["--model_name_or_path", str(tmp_path / "out"), "--output", second, "--before", first, "--figure", figure]
    assert main(["evaluate", *shared, *after]) == 0
    assert json.loads((tmp_path / "after.json").read_text())["languages"].keys() == {"en", "ar", "bn", "sw"}
    assert (tmp_path / "change.png").stat().st_size > 1000
    numbers = [json.loads(Path(path).read_text())["languages"]["sw"]["margin"] for path in (first, second)]
    assert f"{numbers[0]:.3f} -> {numbers[1]:.3f}" in capsys.readouterr().out

    assert main(["scan", "--model_name_or_path", tiny, *shared]) == 0
    printed = capsys.readouterr().out
    assert "8 prompts, 4 languages, chance 0.125" in printed
    marked = [line.split()[1] for line in printed.splitlines() if "<- auto, with mlc_pooling" in line]
    assert marked == ["last", "mean"]  # auto looks at the pooling that is trained with, and at no other


def test_sft_from_flags_with_evaluation(tiny, tmp_path, capsys):
    path = tmp_path / "sft.jsonl"
    lines = [
        {"prompt": f"say {w}", "completion": " yes", "prompt_sw": f"sema {w}"} for w in ("cat", "boat", "sun", "tea")
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    options = f"--model_name_or_path {tiny} --dtype float32 --dataset_name {path} --flat_prefix prompt_ --max_steps 1"
    options += f" --output_dir {tmp_path / 'sft'} --report_to none --bf16 False --use_cpu --mlc_layer -1"
    options += f" --eval_strategy steps --eval_steps 1 --eval_dataset_name {path}"
    assert main(["sft", *options.split()]) == 0
    assert json.loads((tmp_path / "sft" / "mlc_config.json").read_text())["layer"] == 4
    assert "eval_mlc/loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dpo"], "the following arguments are required: --dataset_name"),
        (["dpo", "--dataset_name", "rows.jsonl", "--save_strategy", "often"], "invalid choice: 'often'"),
        (["evaluate", "--dataset_name", "rows.jsonl", "--batch_size", "x"], "invalid int value: 'x'"),
        (["scan", "--dataset_name", "rows.jsonl", "--output", "."], ". is a folder; name the file to write"),
        (["kto"], "Unknown command 'kto'; known are sft, dpo, evaluate, scan"),
        (["evaluate", "--dataset_name", "rows.txt"], "rows.txt ends in '.txt'; rows are read from files that end in"),
        (["evaluate", "--model_name_or_path", "none", "--dataset_name", "none.jsonl"], "There is no file none.jsonl"),
        (["scan", "--model_name_or_path", "none", "--dataset_name", "none.jsonl"], "There is no file none.jsonl"),
        (["evaluate", "--dataset_name", "damaged.jsonl"], "damaged.jsonl cannot be read: JSON parse error"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_words_are_told_in_one_line(tiny, words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a row\n")
    (tmp_path / "damaged.jsonl").write_text('{"prompt": "a"\n')
    model = ["--model_name_or_path", tiny, "--device", "cpu"] if words[0] in ("evaluate", "scan") else []
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    capsys.readouterr()
    assert main([*words, *model]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("trl-mlc: ")]
    assert line.startswith("trl-mlc: error: ")
    assert told in line
    assert "usage:" not in said.out + said.err


def test_versions(capsys):
    assert main(["--version"]) == 0
    assert {"hf-concord", "trl", "transformers", "torch"} <= set(capsys.readouterr().out.split())


def test_help_and_unknown_commands(capsys):
    assert main([]) == 0
    assert "scan" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert "Unknown command 'train'" in capsys.readouterr().err
    for words, message in (
        (["--dataset_name", "rows.jsonl"], "Name a model"),
        (["--dataset_name", "x", "--figure", "y.png"], "give the earlier one with --before"),
    ):
        assert main(["evaluate", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("trl-mlc: error: ")
        assert message in error


def test_wrong_input_is_one_line_that_names_it(tiny, data, tmp_path, capsys):
    empty, broken, nothing = tmp_path / "empty.jsonl", tmp_path / "broken.yaml", tmp_path / "nothing.json"
    empty.write_text("")
    broken.write_text("a: [1\n")
    nothing.write_text('{"a": 1}')
    model = ["--model_name_or_path", tiny, "--dtype", "float32"]
    read = [*model, "--dataset_name", data]
    train = [*read, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--bf16", "False", "--use_cpu"]
    before = ["--before", str(nothing), "--figure", str(tmp_path / "f.png")]
    for words, message in (
        (["dpo", "--config", str(broken)], "broken.yaml"),
        (["evaluate", *model, "--dataset_name", str(empty)], "no rows"),
        (["scan", *read, "--limit", "0"], "--limit must be at least 1, got 0"),
        (["scan", *read, "--poolings", "max"], "poolings must be among ['last', 'mean'], got ['max']"),
        (["evaluate", *read, "--pooling", "max"], "pooling must be one of ['last', 'mean'], got 'max'"),
        (["evaluate", *read, "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["evaluate", *read, "--languages", "xx"], "['xx'] are in none of them (they have ['ar', 'bn', 'sw'])"),
        (["evaluate", *read, "--output", str(tmp_path / "no" / "r.json")], "there is no folder"),
        (["scan", *read, "--figure", "f.xyz"], "must end in one of ['.png', '.svg', '.pdf'], got 'f.xyz'"),
        (["evaluate", *read, *before], "nothing.json is no report"),
        (["dpo", *train, "--eval_strategy", "steps"], "Name some with --eval_dataset_name"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trl-mlc: error: "), words
        assert message in error


def test_a_checkpoint_of_another_extractor_is_refused(tiny, data, tmp_path, capsys):
    options = f"--model_name_or_path {tiny} --dtype float32 --dataset_name {data} --output_dir {tmp_path / 'out'}"
    options += " --report_to none --bf16 False --use_cpu --save_steps 1 --mlc_layer 3"
    assert main(["dpo", *options.split(), "--max_steps", "1", "--mlc_extractor_dim", "8"]) == 0
    again = ["dpo", *options.split(), "--max_steps", "2", "--resume_from_checkpoint", "last"]
    assert main([*again, "--mlc_extractor_dim", "4"]) == 2
    assert "was trained with mlc_extractor_dim=8, this run has 4" in capsys.readouterr().err
    assert main([*again, "--mlc_extractor_dim", "8"]) == 0


def test_wrong_devices_models_and_options_are_named(tiny, data, capsys):
    from accelerate.state import PartialState

    from trl_mlc import cli

    assert cli._device("auto") == PartialState().device
    assert cli._device("cpu").type == "cpu"
    assert main(["evaluate", "--model_name_or_path", "absent-model", "--dataset_name", data]) == 2
    assert "'absent-model' is no folder here" in capsys.readouterr().err
    assert main(["dpo", "--model_name_or_path", tiny, "--dataset_name", data, "--mlc_wieght", "1"]) == 2
    assert "dpo has no option --mlc_wieght; did you mean --mlc_weight?" in capsys.readouterr().err
    words = ["--model_name_or_path", tiny, "--dataset_name", data]
    assert main(["evaluate", *words, "--device", "meat"]) == 2
    assert "--device 'meat' cannot be used" in capsys.readouterr().err


def test_training_without_a_gpu_says_what_to_add(tiny, data, capsys, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    assert main(["dpo", "--model_name_or_path", tiny, "--dataset_name", data]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "dpo found no GPU with bfloat16 here. Add --use_cpu" in said


def test_a_defect_keeps_its_traceback(monkeypatch):
    from trl_mlc import cli

    monkeypatch.setattr(cli, "evaluate", lambda arguments: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        main(["evaluate"])
