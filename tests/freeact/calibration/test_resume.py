"""An interrupted calibration goes on where it stopped, to the very same model, or says that it cannot."""

import pytest
import torch

from optimum_freeact import quantize
from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import logits, settings
from tests.helpers.tiny_models import sample_ids, tiny


SIZE = {"num_hidden_layers": 3}


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, blocks):
    """The power fails after so many finished blocks."""
    original, done = BlockStore.save, []

    def save(self, index, block):
        original(self, index, block)
        done.append(index)
        if len(done) == blocks:
            raise Interrupted

    monkeypatch.setattr(BlockStore, "save", save)


@pytest.mark.parametrize("changes", [{}, {"preset": "flatquant", "epochs": 1}, {"error_correction": True}])
@pytest.mark.parametrize("blocks", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, blocks, changes):
    expected = quantize(tiny("llama", **SIZE), settings(**changes))
    config = settings(resume_dir=str(tmp_path / "blocks"), **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, blocks)
        with pytest.raises(Interrupted):
            quantize(tiny("llama", **SIZE), config)
    files = sorted((tmp_path / "blocks").glob("*.safetensors"))
    assert [file.stem for file in files] == [f"block-{i:04d}" for i in range(blocks)]
    before = {file: file.stat().st_mtime_ns for file in files}
    model = quantize(tiny("llama", **SIZE), config)
    assert all(file.stat().st_mtime_ns == before[file] for file in files)  # read, not made again
    ours, theirs = model.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_config.input_groups == expected.config.quantization_config.input_groups


def test_a_torn_block_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    from optimum_freeact.calibration import resume

    def torn(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    config = settings(resume_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", torn)
        with pytest.raises(OSError, match="No space"):
            quantize(tiny("llama", **SIZE), config)
    assert not list(tmp_path.glob("*.safetensors"))
    model = quantize(tiny("llama", **SIZE), config)
    assert torch.equal(logits(model), logits(quantize(tiny("llama", **SIZE), settings())))


DAMAGE = {
    "cut": lambda whole: whole[:500],
    "empty": lambda whole: b"",
    "renamed": lambda whole: whole.replace(b"qscale", b"qscalf", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_named_and_deleting_it_helps(tmp_path, damage):
    config = settings(resume_dir=str(tmp_path))
    expected = quantize(tiny("llama", **SIZE), config)
    block = tmp_path / "block-0001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(DAMAGE[damage](whole))
    with pytest.raises(ValueError, match=r"finished block '.*block-0001.safetensors' is damaged \(.*Delete this file"):
        quantize(tiny("llama", **SIZE), config)
    block.unlink()
    assert torch.equal(logits(quantize(tiny("llama", **SIZE), config)), logits(expected))
    assert block.read_bytes() == whole


OTHERS = {
    "bits": ({"weight_bits": 8}, {}),
    "seed of the config": ({"seed": 5}, {}),
    "data": ({"dataset": sample_ids(6, 24, seed=8)}, {}),
    "preset": ({"preset": "rtn"}, {}),
    "weights": ({}, {"seed": 1}),
    "size": ({}, {"intermediate_size": 64}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run_is_refused_and_told_what_to_do(tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            quantize(tiny("llama", **SIZE), settings(resume_dir=str(tmp_path)))
    config, model = OTHERS[change]
    other = tiny("llama", **{**SIZE, **model})
    with pytest.raises(
        ValueError, match="holds blocks of another model, calibration set or config.*Delete it or name"
    ):
        quantize(other, settings(resume_dir=str(tmp_path), **config))
    assert not quantized_linears(other)


def test_what_does_not_change_the_result_does_not_matter(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            quantize(tiny("llama", **SIZE), settings(resume_dir=str(tmp_path)))
    quantize(tiny("llama", **SIZE), settings(resume_dir=str(tmp_path), progress=True, calibration_device="cpu"))
