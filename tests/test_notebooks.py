"""The notebooks: their cells run in order, at small settings, and they are committed without outputs."""

import ast
import json

import pytest

from tests.conftest import asset_or_skip
from tests.helpers import forked
from tests.test_layering import ROOT


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
#: Lines that make them short; each must be there. The models of the first two are tiny ones, made by the test.
SMALL = {
    "quantize": {
        'model_path = fetch("smollm2")': "model_path = TINY",
        "samples, length, windows = 8, 256, 4": "samples, length, windows = 4, 32, 2",
        '(fetch("brown") / "text.txt").read_text(encoding="utf-8")': '"The quick brown fox jumps over it. " * 300',
    },
    "align": {
        'model_path = fetch("smollm2")': "model_path = TINY",
        '("de", "es", "fr"), 8, 32, 8': '("de", "es"), 2, 8, 4',
        'target_modules="all-linear"': 'target_modules=["q_proj", "v_proj"]',
    },
    "merge": {"width, neurons, blocks, samples = 64, 128, 4, 256": "width, neurons, blocks, samples = 32, 64, 3, 256"},
}
#: What must hold at the end, in the notebook's own names.
CHECKS = {
    "quantize": "assert losses['full precision'] > 0 and len(losses) == 4 and all(len(e) == 4 for e in errors.values())",
    "align": "assert before.languages.keys() == after.languages.keys() and trainer.state.global_step == 2",
    "merge": "assert exact < 1e-3 and closed < 1e-6 and change(average) > 0.1, (exact, closed)",
}


def cells(path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def program(path) -> str:
    """All code cells as one program that shows what each cell would show: its last expression."""
    parts = []
    for cell in cells(path):
        last, lines = ast.parse(cell).body[-1], cell.splitlines()
        if isinstance(last, ast.Expr):
            cell = "\n".join([*lines[: last.lineno - 1], f"print({chr(10).join(lines[last.lineno - 1 :])})"])
        parts.append(cell)
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    from tests.mlc.conftest import byte_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("notebooks") / "tiny"
    tiny_llama(byte_tokenizer()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_there_is_one_for_each_package():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    document = json.loads(path.read_text())
    assert document["nbformat"] == 4
    assert document["cells"][0]["source"][0].startswith("# ")
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run_in_order(path, tiny_folder, tmp_path):
    if path.stem == "align":
        asset_or_skip("concepts")
    code = f"TINY = {str(tiny_folder)!r}\n{program(path)}\n{CHECKS[path.stem]}\n"
    for old, new in SMALL[path.stem].items():
        assert old in code, f"{path.name} no longer says {old!r}"
        code = code.replace(old, new)
    (tmp_path / "program.py").write_text(code)
    run = forked.run(str(tmp_path / "program.py"), cwd=str(ROOT))
    assert run.returncode == 0, run.stderr[-3000:]
