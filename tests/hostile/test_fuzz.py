"""A seeded sample of the fuzzed surfaces; `benchmarks/hostile/run.py` sends ten thousand and more through them."""

import logging

import pytest

from tests.hostile import freeact_surfaces, merge_surfaces, mlc_surfaces
from tests.hostile.surfaces import Changed, Surface, fuzz


SURFACES = {**freeact_surfaces.SURFACES, **merge_surfaces.SURFACES, **mlc_surfaces.SURFACES}
CASES = 40


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    from transformers.utils import logging as chatter

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    logging.disable(logging.CRITICAL)
    bars = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    yield
    logging.disable(logging.NOTSET)
    if bars:
        chatter.enable_progress_bar()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SURFACES)
def test_every_failure_is_explained_and_leaves_nothing(name, tmp_path):
    found = fuzz(SURFACES[name], CASES, 0, tmp_path / "cases")
    assert found.findings == []
    assert found.total >= CASES // 2  # hypothesis leaves out doubles
    assert found.counts["refused"] > 0  # hostile enough to be worth it


def test_findings_are_seen(tmp_path):
    """Accidents, changed results and left files are told from explained failures."""
    from hypothesis import strategies as st

    def run(kind, folder):
        if kind == "accident":
            [].pop()
        if kind == "changed":
            raise Changed("other logits")
        (folder / "out").write_text("half")
        if kind == "left":
            raise FileNotFoundError(2, "No such file", "weights")
        if kind == "silent":
            raise ValueError("no")

    kinds = st.sampled_from(["accident", "changed", "left", "silent", "fine"])
    found = fuzz(Surface(kinds, run, writes=True), 60, 0, tmp_path / "cases")
    assert found.counts["accepted"] >= 1
    assert {case["kind"]: case["why"] for case in found.findings if "changed" in case["case"]} == {
        "unexplained": "other logits"
    }
    assert any("IndexError" in case["why"] for case in found.findings)
    assert any(case["kind"] == "partial" and "refused; left ['out']" in case["why"] for case in found.findings)
    assert any("says only 'no'" in case["why"] for case in found.findings)
