"""Reports: sizes against hand counts, the comparison's files, figures, and the pages that must follow the code."""

import json
import re
from pathlib import Path

import pytest
import torch

from optimum_freeact import FreeActConfig, quantize
from optimum_freeact.kernels import torch_product
from optimum_freeact.modules.layout import INPUT_GROUPS
from optimum_freeact.presets import PRESETS
from optimum_freeact.report import plots
from optimum_freeact.report.inspection import cache_of, kernel_of
from optimum_freeact.report.model_card import model_card
from optimum_freeact.report.report import FULL_PRECISION, Comparison, Row, cells, measured, write_files
from optimum_freeact.report.sizes import QuantizedSize, human, quantized_size, tensor_bytes, unquantized
from tests.helpers.tiny_models import sample_ids, tiny


ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n"


def quantized(family="llama", **settings):
    config = FreeActConfig(
        **{"preset": "rtn", "dataset": sample_ids(4, 16), "n_samples": 4, "seq_len": 16, "progress": False, **settings}
    )
    return quantize(tiny(family), config)


def comparison(**changes):
    fields = {
        "model": "tiny",
        "dataset": "a.txt",
        "text": "b|c.txt",
        "n_tokens": 310,
        "window": 32,
        "settings": {"n_samples": 4, "seed": 0},
        "machine": {"processor": "a CPU", "torch": "2.9"},
        "rows": [
            measured(FULL_PRECISION, "float32", 3.0, 3.0),
            measured("rtn", "W4A4", 3.5, 3.0, size_ratio=0.26, calibration_seconds=1.0, output_error=[0.1, 0.3]),
            measured("freeact", "W4A4", 3.1, 3.0, size_ratio=0.29, calibration_seconds=2.0, output_error=[0.02, 0.0]),
            Row("quarot", "W4A4", note="it could | not"),
        ],
    }
    return Comparison(**fields | changes)


# --- sizes -------------------------------------------------------------------------------------------------------


def test_size_of_round_to_nearest_is_half_a_byte_a_weight_and_a_scale_a_row():
    size = quantized_size(quantized())
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    clips = 8 * 4  # one per input
    assert size == QuantizedSize(14, 8, weights, weights // 2 + 4 * rows + clips, 2 * weights)
    assert size.ratio == size.stored_bytes / (2 * weights)
    assert quantized_size(tiny("llama")).ratio == 1.0


def test_everything_of_a_model_is_counted_once():
    model = quantized("qwen2", preset="freeact")  # tied embeddings
    rest = unquantized(model)
    total = sum(one.n_bytes for one in rest) + quantized_size(model).stored_bytes
    stored = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    assert total == tensor_bytes(stored.values())
    assert [one.name for one in rest] == ["model.embed_tokens.weight", "norms and biases"]


def test_what_stays_is_named_with_its_reason():
    model = quantized("qwen3_moe", modules_to_not_convert=["o_proj", "experts"])
    reasons = {one.name: one.why for one in unquantized(model)}
    assert "excluded" in reasons["model.layers.*.self_attn.o_proj.weight"]
    assert "3-D parameters" in reasons["model.layers.*.mlp.experts.gate_up_proj"]
    assert "outside the decoder blocks" in reasons["lm_head.weight"]
    assert "model.layers.*.self_attn.q_proj.weight" not in reasons


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (269_060_552, "269.1 MB"),
        (1.5e12, "1.5 TB"),
        (2e16, "20000.0 TB"),
    ],
)
def test_bytes_are_written_for_people(n_bytes, text):
    assert human(n_bytes) == text


# --- which product runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vnni", [True, False])
def test_the_description_is_what_the_dispatch_does(monkeypatch, vnni):
    monkeypatch.setattr(torch_product, "cpu_has_vnni", lambda: vnni)
    calls = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(1) or (a.float() @ b.float()).int())
    codes = torch.ones(4, 8, dtype=torch.int8)
    torch_product.int_linear(codes, codes)
    name, reason = torch_product.describe("cpu")
    assert ("_int_mm" in name) == bool(calls) == vnni
    assert "VNNI" in reason
    assert "float32" in torch_product.describe("meta")[0]
    assert "_int_mm" in torch_product.describe("cuda")[0]


def test_settings_that_need_float_products_say_why(monkeypatch):
    assert "activation_bits=16" in kernel_of(FreeActConfig(activation_bits=16), torch.device("cpu"))[1]
    odd = FreeActConfig("freeact-fast", weight_group_size=20)
    assert "weight_group_size=20" in kernel_of(odd, torch.device("cpu"))[1]
    monkeypatch.setenv("FREEACT_KERNELS", "torch")
    assert kernel_of(FreeActConfig("freeact-fast"), torch.device("cpu"))[0] == torch_product.describe("cpu")[0]
    assert "dequantized" in kernel_of(FreeActConfig(), torch.device("cpu"))[0]


# --- comparisons -------------------------------------------------------------------------------------------------


def test_comparison_survives_its_file(tmp_path):
    assert write_files(comparison(), tmp_path) == ["comparison.json", "comparison.md"]
    assert Comparison.from_json((tmp_path / "comparison.json").read_text()) == comparison()


def test_markdown_has_a_row_for_each_and_says_what_failed():
    text = comparison().to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[3] == "| W4A4 | rtn | 33.12 | 3.5000 | +0.5000 | 0.260 | 1.0 |"
    assert lines[5] == "| W4A4 | quarot | failed | – | – | – | – |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert "- W4A4 quarot: it could | not" in text
    assert "310 tokens in windows of 32" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize("nll", [float("nan"), float("inf")])
def test_a_broken_model_gets_a_note_and_the_json_stays_json(nll):
    row = measured("rtn", "W4A4", nll, 3.0, size_ratio=0.3)
    assert (row.nll, row.perplexity, row.excess) == (None, None, None)
    assert str(nll) in row.note
    json.loads(comparison(rows=[row]).to_json(), parse_constant=lambda name: pytest.fail(name))


def test_large_perplexities_stay_short():
    assert cells(measured("rtn", "W4A4", 20.0, 3.0))[2] == "4.85e+08"
    assert cells(measured("rtn", "W4A4", 1e4, 3.0))[2] == "1.01e+304"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "other"}, "no comparison"), ({"format_version": 2}, "format version 2"), (None, "no comparison")],
)
def test_other_json_is_refused(change, message):
    document = json.loads(comparison().to_json())
    with pytest.raises(ValueError, match=message):
        Comparison.from_json(json.dumps([] if change is None else document | change))


def test_figure_is_drawn_from_the_file_alone(tmp_path):
    pytest.importorskip("matplotlib")
    write_files(comparison(), tmp_path)
    plots.plot_comparison(tmp_path / "comparison.json", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    nothing = comparison(rows=[measured(FULL_PRECISION, "float32", 3.0, 3.0), Row("rtn", "W4A4", note="failed")])
    write_files(nothing, tmp_path)
    plots.plot_comparison(tmp_path / "comparison.json", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)


def test_what_reads_the_cache_is_told(monkeypatch):
    from optimum_freeact.kernels import kv_dispatch, kv_self_check

    source = tiny("llama").config
    source.dtype = torch.bfloat16
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert cache_of(FreeActConfig(), source, cpu) is None
    assert cache_of(FreeActConfig(kv_bits=4), source, cpu) == (
        "torch",
        "no kernel reads the cache on device type 'cpu'",
    )
    monkeypatch.setattr(kv_dispatch, "triton_obstacle", lambda index: None)
    monkeypatch.setattr(kv_self_check, "cache_obstacle", lambda index, rotated: None)
    assert cache_of(FreeActConfig(kv_bits=4), source, gpu)[0] == "Triton kernels"
    assert "8" in cache_of(FreeActConfig(kv_bits=8), source, gpu)[1]
    source.dtype = torch.float32
    assert "float32" in cache_of(FreeActConfig(kv_bits=4), source, gpu)[1]
    monkeypatch.setattr(kv_self_check, "cache_obstacle", lambda index, rotated: "they disagree")
    source.dtype = torch.float16
    assert cache_of(FreeActConfig(kv_bits=4), source, gpu) == ("torch", "they disagree")


# --- pages that follow the code ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_hub", "base"), [(True, "org/name"), (False, "name")])
def test_model_card_names_a_hub_model_in_its_metadata_only(on_hub, base):
    config = FreeActConfig()
    config.calibration_record = {"n_samples": 4, "seq_len": 16, "seconds": 1.5, "output_error": [0.25]}
    text = model_card(
        base=base,
        on_hub=on_hub,
        folder="out",
        dataset="texts.txt",
        config=config,
        size=QuantizedSize(2, 1, 100, 60, 200),
        chat=False,
        auto="AutoModelForImageTextToText",
    )
    assert (
        "from transformers import AutoModelForImageTextToText, AutoTokenizer\n\nmodel = AutoModelForImageTextToText.from_pretrained"
        in text
    )
    assert "import optimum_freeact  # makes transformers know this quantization" in text
    front = text.split("---\n")[1]
    assert ("base_model: org/name" in front) == on_hub
    assert "pipeline_tag: image-text-to-text" in front
    assert "| 2 | 1 | 60 B | 200 B | 0.300 |" in text
    assert "| 0 | 0.25 |" in text
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert settings["rounding"] == config.rounding
    assert FreeActConfig(**settings).to_dict() | {"calibration_record": 0} == config.to_dict() | {
        "calibration_record": 0
    }


COLUMNS = {
    "transform": "transform",
    "channel_scale": "channel scale",
    "centring": "centring",
    "low_rank": "low rank",
    "groups": "groups W, A",
    "rounding": "rounding",
    "activation_symmetric": "activations",
    "activation_clip": "clip",
    "token_types": "types",
    "calibration": "calibration",
}


def presets_table():
    """The table of docs/freeact.md, from the presets themselves."""
    lines = [["preset", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    for name, preset in PRESETS.items():
        values = {**preset, "activation_symmetric": "symmetric" if preset["activation_symmetric"] else "asymmetric"}
        values["token_types"] = ", ".join(preset["token_types"])
        sizes = [preset.get(f"{side}_group_size") for side in ("weight", "activation")]
        values["groups"] = "none" if sizes == [None, None] else ", ".join(map(str, sizes))
        lines.append([f"`{name}`", *(str(values[field]) for field in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_documented_presets_are_the_presets():
    page = (ROOT / "docs" / "freeact.md").read_text()
    assert page.partition("<!-- presets -->\n")[2].partition("\n<!-- /presets -->")[0] == presets_table()


def test_documented_families_are_those_of_the_table():
    page = " ".join((ROOT / "docs" / "freeact.md").read_text().split())
    listed = re.search(r"share an input for (.*?)\. For others", page)[1].lower().replace("-", "")
    families = {re.sub(r"(_text|\d*)$", "", name.replace("_text", "")) for name in INPUT_GROUPS}
    assert all(name in listed for name in families), (families, listed)
