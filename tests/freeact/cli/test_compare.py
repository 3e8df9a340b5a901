"""`freeact compare`: its table and figure, resuming, and presets that cannot."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.cli import main
from optimum_freeact.report.evaluate import score_text, tokenize_windows
from tests.freeact.cli.words import OTHER, SMALL, WINDOWS, fails, paths, tree
from tests.helpers.tiny_models import tiny_tokenizer


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
