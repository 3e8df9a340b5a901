"""A saved folder appears whole or not at all."""

import copy
import errno
import os
import resource
import signal

import pytest
import safetensors.torch
import torch
from transformers import modeling_utils

from optimum_freeact import save
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.joined import STORED
from tests.helpers.quantized import logits, quantized, reload
from tests.helpers.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return quantized("llama", {"num_hidden_layers": 1})


def test_a_saved_model_loads_and_nothing_else_is_there(model, tmp_path):
    folder = save(model, tmp_path / "new" / "model", tiny_tokenizer())
    assert folder == tmp_path / "new" / "model"
    assert torch.equal(logits(reload(folder)), logits(model))
    assert {path.name for path in folder.parent.iterdir()} == {"model"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {p.name for p in folder.iterdir()}
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    os.mkdir(tmp_path / "usual")
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_linears_that_share_one_buffer_are_saved_each_for_itself(model, tmp_path):
    """On a GPU what reads one input is one product (`modules.joined`), and each linear's weight a part of the whole."""
    folder, changed = save(model, tmp_path / "apart"), copy.deepcopy(model)
    sources = [m for m in changed.modules() if isinstance(m, FreeActInput) and len(m.readers) > 1]
    for source in sources:
        for name in STORED:
            whole = torch.cat([getattr(reader, name).data for reader in source.readers])
            parts = whole.split([len(getattr(reader, name)) for reader in source.readers])
            for reader, part in zip(source.readers, parts, strict=True):
                getattr(reader, name).data = part
    assert sources
    save(changed, tmp_path / "together")
    weights = "model.safetensors"
    assert (tmp_path / "together" / weights).read_bytes() == (folder / weights).read_bytes()


def test_an_existing_folder_is_left_alone_unless_told(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save(model, folder)  # empty: welcome
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model' exists already.*overwrite=True"):
        save(model, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    save(model, folder, overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file' exists already"):
        save(model, tmp_path / "file", overwrite=True)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch, failure, there):
    folder = tmp_path / "model"
    if there:
        folder.mkdir()
        (folder / "old.txt").write_text("old")

    def full(tensors, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise failure

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match=r"model' failed \(.*No space left.*nothing was left there.*MB are free"):
        save(model, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])
    assert not there or (folder / "old.txt").read_text() == "old"
    monkeypatch.undo()
    save(model, folder, overwrite=True)
    assert torch.equal(logits(reload(folder)), logits(model))


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("there", [False, True])
def test_save_pretrained_itself_leaves_a_folder_as_it_was(model, tmp_path, monkeypatch, failure, there):
    folder = tmp_path / "deep" / "model"
    if there:
        quantized("llama", {"num_hidden_layers": 1, "seed": 1}).save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else {}

    def full(tensors, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", full)
        with pytest.raises(OSError, match=r"model' failed \(.*No space left.*nothing was left there.*MB are free"):
            model.save_pretrained(folder)
    if there:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:
        assert list(tmp_path.iterdir()) == []
    model.save_pretrained(folder)
    assert torch.equal(logits(reload(folder)), logits(model))
    assert not there or (folder / "notes.txt").read_text() == "mine"


def test_save_pretrained_takes_its_arguments_and_replaces_earlier_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    model.save_pretrained(str(tmp_path), True, max_shard_size="30KB")
    fewer = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert 1 < len(fewer) < len(shards)
    assert not fewer & shards
    assert torch.equal(logits(reload(tmp_path)), logits(model))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        model.save_pretrained(tmp_path / "file")
    clone = copy.deepcopy(model)
    assert clone.save_pretrained.__self__ is clone
    clone.dequantize()
    assert "save_pretrained" not in vars(clone)


def test_a_file_size_limit_of_the_system_is_such_a_failure(model, tmp_path):
    """The same without pretending: the system itself refuses to write more than 32 KB into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, before[1]))
    try:
        for write in (save, lambda model, folder: model.save_pretrained(folder)):
            with pytest.raises(OSError, match="failed.*nothing was left there"):
                write(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
