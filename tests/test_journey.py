"""The journey on tiny models: four steps, ordinary checkpoints, one page; a second run keeps what is done."""

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.quantized import ROOT
from tests.merge.tiny import build, save, texts
from tests.mlc.conftest import rows


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


@pytest.mark.filterwarnings("ignore")
def test_merge_align_quantize_chat(tmp_path, monkeypatch):
    for seed, name in enumerate(("target", "donor")):
        place = save(build(seed=seed, max_position_embeddings=512), tmp_path / name)
        config = json.loads((place / "tokenizer_config.json").read_text())
        config |= {"chat_template": TEMPLATE, "eos_token": "!", "pad_token": "#"}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("\n\n".join(texts(500, length=14)))
    table = rows(12)
    lines = [json.dumps({name: table[name][i] for name in table}) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    inputs = [f"--{name}={tmp_path / name}" for name in ("target", "donor")]
    inputs += [f"--text={tmp_path / 'text.txt'}", f"--rows={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'out'}"]

    spec = importlib.util.spec_from_file_location("journey", ROOT / "examples" / "journey" / "run.py")
    journey = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(journey)
    commands = []

    def here(module, *words):  # in this process: the same commands, without importing everything five times
        from mergekit_ot.cli import main as merge
        from optimum_freeact.cli import main as freeact
        from trl_mlc.cli import main as mlc

        main = {"mergekit_ot": merge, "trl_mlc.cli": mlc, "optimum_freeact.cli": freeact}[module]
        commands.append(module)
        assert main([str(word) for word in words]) == 0

    monkeypatch.setattr(journey, "run", here)

    def travel():
        commands.clear()
        return journey.main(inputs).read_text()

    page = travel()
    assert commands == ["mergekit_ot", "trl_mlc.cli", "trl_mlc.cli", "trl_mlc.cli", "optimum_freeact.cli"]
    for step in ("0-target", "1-merged", "2-aligned", "3-quantized"):
        assert f"| {step} |" in page
    for step in ("merging", "aligning", "quantizing"):
        assert f"- {step}: " in page
    for picture in ("steps.png", "languages.png"):
        assert picture in page
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    steps = {row["model"]: row for row in json.loads((tmp_path / "out" / "steps.json").read_text())}
    assert len({round(row["nll"], 6) for row in steps.values()}) == 4  # every step changed something
    assert len(steps["1-merged"]["answers"]) == 2
    for step in ("1-merged", "2-aligned", "3-quantized"):
        import optimum_freeact  # noqa: F401

        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / step)
    assert travel() == page  # nothing is done twice
    assert commands == []

    from benchmarks.journey.run import rows_of

    found = rows_of(tmp_path / "out")
    assert {(row["step"], row["metric"]) for row in found if "step" in row} >= {
        ("3-quantized", "nll"),
        ("1-merged", "seconds"),
    }
    assert {row["language"] for row in found if "language" in row} == {"en", "ar", "bn", "sw", "mean"}
