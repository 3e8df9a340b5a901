"""The page about token types: shares and errors are what they say, and everything is written from the rows."""

import json

import pytest
import torch

from optimum_freeact.api import quantize
from optimum_freeact.calibration import closed_form
from optimum_freeact.config import FreeActConfig
from optimum_freeact.report.type_report import RANKS, measure_types, write_report
from tests.freeact.test_type_rules import MASK, masked_llama
from tests.helpers.quantized import settings
from tests.helpers.tiny_models import sample_ids
from tests.helpers.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def rows():
    ids = sample_ids(8, 24, seed=7)
    ids[:, 15:] = MASK
    return measure_types(masked_llama(), ids, FreeActConfig())


def test_every_input_and_type_has_a_row(rows):
    assert {row.type for row in rows} == {"text", "sink", "mask"}
    assert {(row.block, row.input) for row in rows} == {
        (b, i) for b in (0, 1) for i in ("q+k+v", "o", "gate+up", "down")
    }
    counts = {row.type: row.tokens for row in rows}
    assert counts == {"text": 8 * 14, "sink": 8, "mask": 8 * 9}


def test_a_constant_input_is_all_mean(rows):
    """Every mask enters the first block with the same embedding; without positions, queries and keys read a constant."""
    first = next(row for row in rows if (row.block, row.input, row.type) == (0, "q+k+v", "mask"))
    assert first.mean_share == pytest.approx(1.0, abs=1e-4)
    assert first.error_typed < 1e-3 * first.error_plain
    text = next(row for row in rows if (row.block, row.input, row.type) == (0, "q+k+v", "text"))
    assert text.mean_share < 0.5


def test_spectra_fall_from_one(rows):
    for row in rows:
        assert len(row.spectrum) == len(RANKS)
        assert row.spectrum[0] == 1.0
        assert all(a >= b - 1e-9 for a, b in zip(row.spectrum, row.spectrum[1:]))
        assert 0 <= row.overlap <= 1


def test_the_page_is_written_from_the_rows(rows, tmp_path):
    page = write_report(rows, tmp_path / "page", "a tiny model")
    text = page.read_text()
    assert text.startswith("# Token types of a tiny model")
    assert (
        f"| {rows[0].block} | {rows[0].input} | {rows[0].type} | {rows[0].tokens} | {rows[0].mean_share:.4f} |" in text
    )
    assert "No exclusive subspace" in text
    assert len(json.loads((tmp_path / "page" / "token_types.json").read_text())["rows"]) == len(rows)
    pytest.importorskip("matplotlib")
    assert "![token_types.png](token_types.png)" in text
    assert (tmp_path / "page" / "token_types.png").stat().st_size > 10_000


def test_pictures_are_a_type_of_their_own():
    model, inputs = tiny_multimodal("llava")
    found = measure_types(model, [inputs] * 4, FreeActConfig())
    assert {row.type for row in found} == {"text", "sink", "image"}
    assert torch.isfinite(torch.tensor([row.error_typed for row in found])).all()


def test_sizes_that_calibration_chose_stand_on_the_page(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        closed_form, "choose_exclusive", lambda m, *_: (torch.eye(m.shift.shape[1])[:, :3].double(), [0, 0, 3])
    )
    model = quantize(masked_llama(), settings(exclusive="closed_form"))
    text = write_report(rows, tmp_path, "a tiny model", model._freeact_records).read_text()
    assert "No exclusive subspace" not in text
    assert text.count("[0, 0, 3]") == 8  # four inputs in each of two blocks
