"""The speed benchmark's claims follow from its rows."""

import json

import pytest
import torch

from benchmarks.speed import claims as gpu
from benchmarks.speed.collect import read_rows
from benchmarks.speed.cpu_claims import claims as cpu_claims
from benchmarks.speed.llama import plain, shape_config


def linear(provider, k, m, n, value, what="linear"):
    return {"what": what, "provider": provider, "k": k, "m": m, "n": n, "metric": "microseconds", "value": value}


def model(provider, run, metric, value):
    return {"what": "model", "provider": provider, "run": run, "layers": 32, "metric": metric, "value": value}


def calibration(gpus, metric, value):
    return {
        "what": "calibration",
        "provider": "freeact",
        "shape": "8b",
        "gpus": gpus,
        "metric": metric,
        "value": value,
    }


def test_claims_of_a_whole_run():
    roof = {"read": 3e12, "copy": 2e12, "datasheet H100": 3.35e12}  # the first counts
    rows = [{"what": "roof", "provider": name, "metric": "bytes_per_second", "value": v} for name, v in roof.items()]
    for k, m in ((4096, 14336), (14336, 4096), (4096, 4096)):
        for n in (1, 16, 2048, 8192):
            rows += [linear("bf16", k, m, n, 300.0), linear("freeact-fastest", k, m, n, 100.0 if n < 8192 else 150.0)]
            rows.append(linear("freeact-fast", k, m, n, 50.0))  # another tier, not the claimed one
    rows.append(linear("freeact-fastest product", 4096, 14336, 1, 16.0, "kernel"))
    rows.append(linear("freeact-fastest product", 4096, 14336, 1, 9.0, "cycled"))  # of one weight, from the cache
    for metric, theirs, ours in (("weight_bytes", 16e9, 5e9), ("peak_bytes", 17e9, 6e9)):
        rows += [model("bf16", "graph", metric, theirs), model("freeact-fastest", "graph", metric, ours)]
    for metric, theirs, ours in (("decode_seconds", 8.0, 4.0), ("prefill_seconds", 6.0, 4.0)):
        rows += [model("bf16", "graph", metric, 2 * theirs), model("bf16", "compile", metric, theirs)]
        rows += [
            model("freeact-fastest", "graph", metric, ours),
            model("freeact-fastest", "compile", metric, 2 * ours),
        ]
    rows += [
        calibration(1, "block_seconds", 9.0),
        calibration(1, "once_seconds", 12.0),
        calibration(2, "block_seconds", 5.0),
    ]
    found = {entry["id"]: entry["value"] for entry in gpu.claims(rows)}
    assert found.pop("speed.decode_roof_share") == 4096 * 14336 / 2 / (3e12 * 16e-6)
    assert found == {
        "speed.linear.prefill_4096x14336": 2.0,
        "speed.linear.prefill_14336x4096": 2.0,
        "speed.linear.prefill_4096x4096": 2.0,
        "speed.linear.decode_4096x14336_m1": 3.0,
        "speed.linear.decode_4096x14336_m16": 3.0,
        "speed.model8b.memory_ratio": 6 / 17,
        "speed.model8b.decode": 2.0,
        "speed.model8b.prefill": 1.5,
        "speed.calibration8b_minutes": 5.0,
        "speed.calibration_two_gpus": 1.8,
    }


def test_the_roof_is_what_was_read_or_the_fastest_that_is_known():
    rows = [
        {"what": "roof", "provider": "copy", "metric": "bytes_per_second", "value": 2.0},
        {"what": "roof", "provider": "datasheet", "metric": "bytes_per_second", "value": 3.0},
    ]
    assert (gpu.memory_speed([]), gpu.memory_speed(rows[:1]), gpu.memory_speed(rows)) == (None, 2.0, 3.0)


def test_a_read_reads_everything():
    pytest.importorskip("triton")
    from benchmarks.speed.roof import BLOCK, read, reads

    x, found = torch.arange(3.0 * BLOCK), torch.empty(3)
    read(x / BLOCK, found)
    torch.testing.assert_close(found, (x / BLOCK).view(3, BLOCK).sum(1))
    assert [len(reads(8 * BLOCK, cycled, "cpu")) for cycled in (1, 20 * BLOCK)] == [1, 3]


def test_what_was_not_measured_is_not_claimed():
    rows = [linear("bf16", 4096, 4096, 2048, 90.0), linear("freeact-fastest", 4096, 4096, 2048, None)]
    assert gpu.claims(rows) == []


def test_cpu_claims_take_the_worse_model():
    rows = [
        {"model": name, "provider": provider, "metric": metric, "value": value}
        for name, decode in (("a", 4.0), ("b", 2.0))
        for provider, metric, value in (
            ("bf16", "decode_seconds", decode), ("freeact", "decode_seconds", 1.0),
            ("bf16", "weight_bytes", 10.0), ("freeact", "weight_bytes", decode),
        )
    ]  # fmt: skip
    assert [(entry["value"], entry["holds"]) for entry in cpu_claims(rows)] == [(2.0, True), (0.4, True)]
    more = [{**row, "threads": 2, "value": 100.0} for row in rows]  # shown, and not claimed
    assert cpu_claims(rows + more) == cpu_claims(rows)


def test_a_row_measured_again_counts_once(tmp_path):
    lines = [linear("bf16", 8, 8, 1, 3.0), linear("bf16", 8, 8, 1, 2.0)]
    (tmp_path / "linear.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["value"] for row in read_rows(tmp_path)] == [2.0]


def test_tuning_takes_the_settings_that_are_best_over_all_shapes():
    """Needs no GPU: times are made up; one candidate fails at a shape, dependent launches win or were not right."""
    pytest.importorskip("triton")
    from benchmarks.speed import tune

    rows = []
    for kernel, most, _, changes in tune.CANDIDATES:
        for number in range(len(changes)):
            for shape in range(len(tune.SHAPES)):
                row = {"what": "candidate", "kernel": kernel, "most": most, "number": number}
                fails = number == 2 and shape == 1
                rows.append(row | ({"failed": "no"} if fails else {"us": {1: 5.0, 2: 1.0}.get(number, 9.0)}))
    expected = {(kernel, most): changes[1] for kernel, most, _, changes in tune.CANDIDATES}
    pdl = [{"what": "pdl", "pdl": on, "us": 4.0 - on} for on in (False, True)]
    for checked, wanted in ((0.01, True), (0.9, False)):
        chosen = tune.choose([*rows, *pdl, {"what": "check", "pdl": True, "w4_y": checked}], tune.SHAPES)
        for (kernel, most), change in expected.items():
            settings = next(settings for limit, settings in chosen[kernel] if limit == most)
            few = most is not None or kernel == "dp4a"
            assert settings == {**change, "pdl": wanted and few}


def test_attention_on_shared_heads_is_attention():
    from transformers import StaticCache

    logits = []
    for attention in ("sdpa", "sdpa_gqa"):
        torch.manual_seed(0)
        config = shape_config("tiny", 2, attention)
        model, cache = plain(config, "cpu").float(), StaticCache(config=config, max_cache_len=24)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, position_ids=ids)
            new = model(input_ids=ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[8]]))
        logits.append(new.logits)
    torch.testing.assert_close(*logits)


def test_ways_of_attention_are_the_same():
    from benchmarks.speed import step

    with torch.no_grad():
        found = {
            name: calls[0]()
            for name, calls in step.attention("cpu", 40).items()
            if name[-5:] not in ("cudnn", "piled")
        }
    want = found.pop("repeated heads").flatten()
    assert set(found) == {"heads as rows", "enable_gqa", "two products"}
    for y in found.values():
        torch.testing.assert_close(y.flatten(), want, rtol=0, atol=0.02)


def test_weights_in_turn_exceed_what_was_asked_for(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.speed import layers, roof

    monkeypatch.setattr(layers.Shape, "part_product", layers.Shape.whole)  # the kernel's own product is a GPU's
    monkeypatch.setattr(roof, "graph_microseconds", lambda calls: (float(len([call() for call in calls])), 0.0))
    rows = list(roof.cycled_rows("cpu", (1, 1_000_000), (512, 512)))
    assert {row["provider"] for row in rows} == {"read only", "bf16", "freeact-fastest", "freeact-fastest product"}
    for row in rows:
        of_weight = row["k"] * row["m"] * (2 if row["provider"] == "bf16" else 0.5)
        assert row["value"] * of_weight >= 1e6 * row["megabytes"] > (row["value"] - 1) * of_weight - 1


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_few_tokens_fit_into_the_cache(tokens, tmp_path, monkeypatch):
    from benchmarks.speed import model as whole

    given = ["--provider", "bf16", "--run", "eager", "--shape", "tiny", "--prompt", "3", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["model", *given, "--tokens", str(tokens), "--out", str(tmp_path)])
    whole.main()
    rows = {row["metric"]: row["value"] for row in map(json.loads, (tmp_path / "model.jsonl").open())}
    assert rows["decode_seconds"] > 0
    assert rows["tokens"] >= 0


def test_no_tokens_are_refused(tmp_path, monkeypatch, capsys):
    from benchmarks.speed import model as whole

    monkeypatch.setattr(
        "sys.argv", ["model", "--provider", "bf16", "--shape", "tiny", "--tokens", "0", "--out", str(tmp_path / "new")]
    )
    with pytest.raises(SystemExit):
        whole.main()
    assert "--tokens 0" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("run", ["memory", "eager"])
def test_rows_of_a_model_come_in_their_order(run, tmp_path, monkeypatch):
    from benchmarks.speed import model as whole

    given = ["--provider", "bf16", "--run", run, "--shape", "tiny", "--prompt", "3", "--rounds", "1", "--tokens", "1"]
    monkeypatch.setattr("sys.argv", ["model", *given, "--out", str(tmp_path)])
    whole.main()
    rows = [json.loads(line) for line in (tmp_path / "model.jsonl").open()]
    labels = {"provider": "bf16", "run": run, "shape": "tiny", "layers": 2, "prompt": 3, "attention": "sdpa_gqa"}
    assert all(labels.items() <= row.items() for row in rows)
    found = [(row["metric"], row.get("how")) for row in rows if "bytes" not in row["metric"]]  # which only a GPU has
    prefill = [("build_seconds", None), ("first_prefill_seconds", None), ("prefill_seconds", "eager")]
    decoding = [("first_decode_seconds", None), ("decode_seconds", None), ("tokens", None)]
    assert found == prefill + (decoding if run == "eager" else [])


def test_token_and_position_are_written_in_place():
    """A CUDA graph reads them where they were when it was captured."""
    from benchmarks.speed.decoding import SAID, WARM, Decoder, Prompt

    config = shape_config("tiny", 1)
    seen = []
    with torch.no_grad():
        decoder = Decoder(Prompt(plain(config, "cpu"), config, 3, 2, "cpu"))

        def step(token, where):
            assert token is decoder.token
            assert where is decoder.where
            seen.append(int(where))
            return decoder.prompt.step(token, where)

        places = decoder.token.data_ptr(), decoder.where.data_ptr()
        decoder.decode(step, 2)
        decoder.said(step)
    assert (decoder.token.data_ptr(), decoder.where.data_ptr()) == places
    assert seen == [*range(3, 3 + WARM + 2), *range(3, 3 + SAID)]


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_of_the_cache_come_in_their_order(batch, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.speed import kv

    monkeypatch.setattr(kv, "graph_microseconds", lambda calls: (float(len(calls)), 0.0))  # a GPU's
    monkeypatch.setattr(kv, "copies_for", lambda n: 3)
    monkeypatch.setattr(kv.kv_attend_triton, "attend", kv.kv_reference.attend)
    rows = kv.measure(batch, 8, "cpu")
    assert all(row["batch"] == batch and row["tokens"] == 8 for row in rows)
    errors = {row["provider"]: row["value"] for row in rows if row["metric"] == "relative_error"}
    assert set(errors) == {"freeact", "unpack, sdpa"}
    assert max(errors.values()) < 0.02
    wanted = [("attention", "sdpa, bfloat16", 3), ("attention", "sdpa, bfloat16, query heads", 3),
              ("attention", "freeact", 3), ("attention", "unpack, sdpa", 2), ("attention", "freeact, not rotated", 3),
              ("attention", "freeact, no means", 3), ("write", "freeact", 8), ("write", "torch", 8),
              ("write", "freeact, not rotated", 8)]  # fmt: skip
    if batch == 1:
        wanted += [("write 2048", "freeact", 8), ("write 2048", "freeact, not rotated", 8)]
    found = [(row["what"], row["provider"], row["value"]) for row in rows if row["metric"] == "microseconds"]
    assert found == wanted
