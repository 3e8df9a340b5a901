"""The comparison that the cache's kernels pass before a GPU uses them."""

import pytest
import torch

from optimum_freeact.kernels import kv_attend_triton, kv_dispatch, kv_self_check, kv_write_triton


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    kv_self_check.cache_obstacle.cache_clear()


@pytest.mark.parametrize("rotated", [False, True])
def test_kernels_that_agree_pass(device, rotated):
    step, prompt = (tokens * kv_self_check.HEADS * len(kv_self_check.STARTS) for tokens in kv_self_check.WRITTEN)
    assert step <= kv_write_triton.FEW < prompt  # both launches are seen
    written = kv_self_check.WRITTEN if rotated or device == "cuda" else (1, 17)  # the interpreter takes long for many
    assert kv_self_check.cache_disagreement(torch.device(device), rotated, written) is None


@pytest.mark.parametrize(
    "wrong",
    [lambda y: y * 1.05, lambda y: y.roll(1, 1), lambda y: y.roll(1, 0), lambda y: y * float("nan")],
    ids=["scale", "heads", "batch", "nan"],
)
def test_attention_that_is_wrong_is_named(device, monkeypatch, wrong):
    right = kv_attend_triton.attend
    monkeypatch.setattr(kv_attend_triton, "attend", lambda *args: wrong(right(*args)))
    assert "attention to states: relative error" in kv_self_check.cache_disagreement(torch.device(device), False, ())


@pytest.mark.parametrize("part", ["mean", "cos", "rotation"])
def test_writing_that_leaves_a_part_out_is_named(device, monkeypatch, part):
    right = kv_write_triton.write_rows

    def without(states, rows, start, position, out):
        kept = getattr(rows, part)
        setattr(rows, part, None)
        try:
            right(states, rows, start, position, out)
        finally:
            setattr(rows, part, kept)

    monkeypatch.setattr(kv_write_triton, "write_rows", without)
    rotated = part == "rotation"
    said = kv_self_check.cache_disagreement(torch.device(device), rotated, (1,))
    assert said.startswith("1 rotated states written" if rotated else "1 states written")


def test_what_a_row_beyond_the_first_gets_is_compared(device, monkeypatch):
    right = kv_write_triton.write_rows

    def same_start(states, rows, start, position, out):
        right(states, rows, torch.zeros_like(start), position, out)

    monkeypatch.setattr(kv_write_triton, "write_rows", same_start)
    assert "8 states written" in kv_self_check.cache_disagreement(torch.device(device), False, (8,))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", "the kernels of the KV cache disagree with torch on this GPU (all)"), ("triton", None)],
)
def test_torch_takes_the_place_of_kernels_that_disagree(monkeypatch, choice, expected):
    monkeypatch.setenv("FREEACT_KERNELS", choice)
    monkeypatch.setattr(kv_dispatch, "triton_obstacle", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(kv_self_check, "cache_disagreement", lambda device, rotated: "all")
    assert kv_dispatch.kv_obstacle(torch.device("cuda:7"), 4, torch.bfloat16, 64, True) == expected


def test_whatever_a_compiler_raises_is_a_reason(monkeypatch):
    def broken(device, rotated):
        raise RuntimeError("ptxas\nmore")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(kv_self_check, "cache_disagreement", broken)
    said = kv_self_check.cache_obstacle(7, False)
    assert said == "the kernels of the KV cache do not run on this GPU (RuntimeError: ptxas)"


def test_a_full_gpu_is_not_a_kernel_that_fails(monkeypatch):
    def full(device, rotated):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(kv_self_check, "cache_disagreement", full)
    with pytest.raises(torch.OutOfMemoryError, match="20.00 MiB"):
        kv_self_check.cache_obstacle(7, False)
    monkeypatch.setattr(kv_self_check, "cache_disagreement", lambda device, rotated: None)
    assert kv_self_check.cache_obstacle(7, False) is None  # room was made, and nothing was remembered
