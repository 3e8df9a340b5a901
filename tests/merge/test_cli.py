"""The command line end to end on tiny models, the examples' recipes, and a light import."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_ot.cli import main
from mergekit_ot.recipe import load_recipe
from tests.merge.test_pipeline import pair, write_recipe
from tests.merge.tiny import texts, write_texts


ROOT = Path(__file__).resolve().parents[2]


def test_plan_inspect_run_eval(tmp_path, capsys):
    _, target, donor = pair(tmp_path, copy="deepened")
    recipe = str(write_recipe(tmp_path, target, donor, alpha=0.5))
    plans, out = str(tmp_path / "plans"), str(tmp_path / "out")
    held_out = str(write_texts(tmp_path / "held_out.txt", texts(6, seed=8)))
    assert main(["plan", recipe, "--plans", plans, "--quiet"]) == 0
    assert main(["inspect", plans]) == 0
    printed = capsys.readouterr().out
    assert "stream map: ot" in printed
    assert "| 1 | 2 |" in printed  # target layer 1 takes donor layer 2
    assert main(["inspect", plans, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_map"] == [0, 2, 3, 5]
    assert main(["run", recipe, out, "--plans", plans, "--quiet", "--out-shard-size", "1M"]) == 0
    printed = capsys.readouterr().out
    assert "28 tensors carry the donor's weights; the gate closed 0 of 8 blocks" in printed
    assert main(["eval", recipe, out, "--plans", plans, "--texts", held_out, "--max-tokens", "500", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "random donor" in printed
    report = json.loads((tmp_path / "out.report" / "report.json").read_text())
    losses = {row["model"]: row["loss"] for row in report["losses"]}
    assert set(losses) == {"target", "merged", "donor", "shrink only", "random donor"}
    assert abs(losses["donor"] - losses["target"]) < 1e-4
    assert abs(losses["merged"] - losses["target"]) < 1e-4  # the donor is the target
    assert abs(losses["shrink only"] - losses["target"]) > 1e-2
    page = (tmp_path / "out.report" / "report.md").read_text()
    assert "does not beat the target" in page or "not knowledge" in page or "beats the target" in page
    assert printed.splitlines()[-2] in page.replace("**", "")
    for name in ("layer_map", "scores", "entropy", "norms", "losses"):
        assert (tmp_path / "out.report" / f"{name}.png").stat().st_size > 5000
        assert f"{name}.png" in page
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_errors_are_one_line_and_name_the_key(tmp_path, capsys):
    _, target, donor = pair(tmp_path)
    recipe = str(write_recipe(tmp_path, target, donor, alhpa=1))
    capsys.readouterr()  # what saving the tiny models printed
    assert main(["run", recipe, str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "unknown key 'alhpa'; did you mean 'alpha'?" in lines[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alpha: [{filter: 3, value: 0.1}]", "filter must be part of a tensor's name, got 3"),
        ("alpha: 0.1\n\tx: 1", "found character '\\t' that cannot start any token (line 2, column 1)"),
        ("donor: 3", "parameters.donor must be a folder or a hub id, got 3"),
    ],
)
def test_what_yaml_makes_of_a_slip_is_told_in_one_line(tmp_path, capsys, text, told):
    head = "merge_method: transport\nbase_model: a\nmodels: [{model: a}]\nparameters:\n"
    head += "  calibration_dataset: t.txt\n" + ("" if "donor" in text else "  donor: b\n")
    (tmp_path / "r.yml").write_text(text if "\t" in text else f"{head}  {text}")
    assert main(["check", str(tmp_path / "r.yml")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["eval", "r.yml", "out", "--max-tokens", "0"], "--max-tokens"),
        (["run", "r.yml", "out", "--out-shard-size", "-5B"], "'-5B' is no size"),
        (["run"], "Missing argument 'RECIPE'"),
        (["frob"], "No such command 'frob'"),
        (["run", "r.yml", "out", "--alpha", "0.2"], "--alpha is no option: write 'alpha' below 'parameters'"),
        (["check", "r.yml", "--samples=3"], "--samples is no option: write 'samples' below 'calibration'"),
        (["check", "r.yml", "--frob"], "No such option"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_words_on_the_command_line_are_told_in_one_line(capsys, command, told):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert "--help" in line


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "merge").glob("*.yml")), ids=lambda path: path.stem)
def test_example_recipes_are_valid(recipe):
    loaded = load_recipe(recipe)
    assert loaded.calibration is not None
    assert f"examples/merge/{recipe.name}" in recipe.read_text()  # each says how to run itself


def test_import_is_light():
    code = (
        "import sys, mergekit_ot; "
        "assert not {'torch', 'mergekit', 'ot', 'transformers', 'matplotlib'} & set(sys.modules); "
        "import mergekit_ot.solve; assert not {'mergekit', 'ot', 'matplotlib', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_exported_name_resolves():
    import mergekit_ot

    for name in mergekit_ot.__all__:
        assert getattr(mergekit_ot, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mergekit_ot.nothing  # noqa: B018


def test_the_end_of_a_job_counts_as_ctrl_c(capsys, monkeypatch, tmp_path):
    def end_of_the_job(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mergekit_ot.cli.load_recipe", end_of_the_job)
    (tmp_path / "r.yml").write_text("merge_method: transport\n")
    assert main(["check", str(tmp_path / "r.yml")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
