"""Where output goes: what may be replaced, and what stands there when something fails."""

import shutil

import pytest

from optimum_freeact.cli import main
from optimum_freeact.commands import folder as folders
from tests.freeact.cli.words import SMALL, fails, tree


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
