"""The transfer benchmark refuses names that stand for nothing before any run, and says what a run that died said last."""

import pytest

from benchmarks.mlc import transfer
from benchmarks.mlc.transfer_methods import first_points


def parsed(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["transfer.py", *given])
    return transfer.parse()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (["--methods", "mlc"], "mlc"),
        (["--map", "--methods", "base", "ours"], "ours"),
        (["--then", "tied@nowhere"], "tied@nowhere"),
        (["--regimes", "nowhere"], "nowhere"),
        (["--ours", "tied"], "tied"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(given, wrong, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *given)
    assert f"unknown {wrong}:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [[], ["--methods", "ours", "guards"], ["--map", "--methods", *first_points()], ["--ours", "chosen"]],
    ids=lambda given: " ".join(given[:3]),
)
def test_names_of_the_table_and_of_the_map_are_known(given, monkeypatch):
    assert transfer.unknown(parsed(monkeypatch, *given)) == []


def test_a_worker_that_dies_is_heard(tmp_path, monkeypatch, capsys):
    options = parsed(monkeypatch, "--tiny", "--rows", str(tmp_path / "rows.jsonl"), "--folder", str(tmp_path))
    monkeypatch.setattr(transfer, "gpus", lambda: [""])
    pool = transfer.Pool(options)
    broken = tmp_path / "broken.py"
    broken.write_text("raise MemoryError('the last words')")
    monkeypatch.setattr(transfer, "__file__", str(broken))
    pool.perform(("ours", 0), "")
    assert "DIED ('ours', 0) MemoryError: the last words" in capsys.readouterr().out
