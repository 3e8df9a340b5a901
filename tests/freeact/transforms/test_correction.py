"""Error correction: the identity for equal streams, the least-squares answer for a disturbed one; shrinkage to noise."""

import torch

from optimum_freeact.transforms.correction import corrected_weight, shrunk_weight


D, OUT, N = 16, 5, 4000


def streams(disturbance):
    mix = torch.randn(D, D, dtype=torch.float64)
    y = torch.randn(N, D, dtype=torch.float64) @ mix
    wrong = torch.eye(D, dtype=torch.float64) + disturbance * torch.randn(D, D, dtype=torch.float64)
    return y @ wrong + 0.05 * torch.randn(N, D, dtype=torch.float64) * (disturbance > 0), y


def test_the_shrunk_weight_predicts_best_from_noisy_inputs():
    x, _ = streams(0.0)
    x[:, 3] = 0  # taken out by a branch: nothing but noise is left
    weight = torch.randn(OUT, D, dtype=torch.float64)
    moments, variance = x.mT @ x / N, 0.5
    found = shrunk_weight(weight, moments, torch.tensor(variance))

    def error(w):  # E |x W^T - (x + n) w^T|^2 over all noise n of this variance
        gap = weight - w
        return float((gap @ moments * gap).sum() + variance * w.square().sum())

    assert found[:, 3].abs().max() < 1e-12
    assert error(found) < error(weight)
    for _ in range(20):
        assert error(found) < error(found + 1e-3 * torch.randn_like(weight))
    assert torch.equal(shrunk_weight(weight, moments, 0.0), weight)
    assert torch.equal(shrunk_weight(weight, moments - 100 * torch.eye(D), variance), weight)  # no moments at all


def test_equal_streams_leave_the_weight():
    x, y = streams(0.0)
    weight = torch.randn(OUT, D, dtype=torch.float64)
    corrected = corrected_weight(weight, x.mT @ x / N, y.mT @ x / N)
    torch.testing.assert_close(corrected, weight, rtol=1e-9, atol=1e-9)


def test_it_is_the_least_squares_solution():
    x, y = streams(0.1)
    weight = torch.randn(OUT, D, dtype=torch.float64)
    wanted = torch.linalg.lstsq(x, y @ weight.mT).solution.mT
    moments, cross = x.mT @ x / N, y.mT @ x / N
    torch.testing.assert_close(corrected_weight(weight, moments, cross), wanted, rtol=1e-7, atol=1e-7)


def test_it_brings_fresh_outputs_nearer_to_the_full_precision_stream():
    x, y = streams(0.1)
    weight = torch.randn(OUT, D, dtype=torch.float64)
    half = N // 2
    eye = 0.01 * torch.eye(D, dtype=torch.float64)
    moments, cross = x[:half].mT @ x[:half] / half + eye, y[:half].mT @ x[:half] / half + eye

    def error(w):
        return float((x[half:] @ w.mT - y[half:] @ weight.mT).square().sum())

    corrected = corrected_weight(weight, moments, cross)
    partly = corrected_weight(weight, moments, cross, strength=0.5)
    assert torch.equal(corrected_weight(weight, moments, cross, strength=0.0), weight)
    assert error(corrected) < 0.1 * error(weight)
    assert error(corrected) < error(partly) < error(weight)
