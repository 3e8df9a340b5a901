"""Commands that are interrupted: they resume to the same bits, or say how they could have."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.cli import main
from tests.freeact.cli.words import SMALL, WINDOWS, fails, paths, tree


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
