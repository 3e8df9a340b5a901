"""Streamed moments equal the direct float64 formulas, also beside a token ten thousand times larger."""

import pytest
import torch

from optimum_freeact.moments import Moments


D = 24


def rows(n=600, sink=1.0, seed=0):
    """Rows with a strong mean, their pairs, and types; every 50th row is a sink, `sink` times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator) + 3 * torch.randn(D, generator=generator)
    types = (torch.arange(n) % 50 == 0).long()
    x[types == 1] = sink * (2 + torch.randn(D, generator=generator)) + torch.randn(12, D, generator=generator)
    y = x + 0.1 * torch.randn(n, D, generator=generator)
    return x, y, types


def streamed(x, y, types, pieces=7, paired=True, n_types=2):
    moments = Moments(D, n_types, torch.device("cpu"), paired=paired, peaks=True)
    for a, b, t in zip(x.chunk(pieces), y.chunk(pieces), types.chunk(pieces)):
        moments.update(a, t, b if paired else None)
    return moments


@pytest.mark.parametrize("sink", [1.0, 1e4])
@pytest.mark.parametrize("pieces", [1, 7])
def test_equal_to_the_direct_formulas(sink, pieces):
    x, y, types = rows(sink=sink)
    moments = streamed(x, y, types, pieces)
    for kind in (0, 1):
        a, b = x[types == kind].double(), y[types == kind].double()
        size = a.abs().max()
        assert moments.count[kind] == len(a)
        torch.testing.assert_close(moments.mean(kind), a.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.mean_of_pair(kind), b.mean(0), rtol=1e-6, atol=1e-6)
        for centre, other in ((a.mean(0), b.mean(0)), (torch.zeros(D).double(),) * 2, (a.mean(0) + 1, b.mean(0) - 1)):
            second = (a - centre).mT @ (a - centre) / len(a)
            cross = (b - other).mT @ (a - centre) / len(a)
            close = {"rtol": 1e-5, "atol": max(2e-5, float(2e-7 * size * centre.abs().max()))}
            torch.testing.assert_close(moments.covariance(kind, centre), second, **close)
            torch.testing.assert_close(moments.cross_covariance(kind, other, centre), cross, **close)
    torch.testing.assert_close(moments.mean(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.mean_of_pair(), y.double().mean(0), rtol=1e-6, atol=1e-6)


def test_covariances_beside_a_massive_sink_stay_positive_and_exact():
    """With one shift for all types the rounding errors of the sink's products exceed its variance."""
    x, y, types = rows(sink=1e4)
    moments = streamed(x, y, types)
    for kind in (0, 1):
        covariance = moments.covariance(kind, moments.mean(kind))
        values = torch.linalg.eigvalsh((covariance + covariance.mT) / 2)
        assert values.min() > -1e-9 * values.max()
        assert values.max() < 100  # the variance, not the energy: the sink's is 1e8


def test_a_type_that_never_came_has_the_mean_of_all():
    x, y, _ = rows()
    moments = streamed(x, y, torch.zeros(len(x), dtype=torch.long))
    torch.testing.assert_close(moments.mean(1), x.double().mean(0), rtol=1e-6, atol=1e-6)
    assert torch.count_nonzero(moments.covariance(1, torch.zeros(D).double())) == 0


def test_sample_rows_are_rows_with_their_types():
    x, y, types = rows(sink=1e4)
    kept, kinds = streamed(x, y, types).rows
    assert 0 < len(kept) <= 512
    index = [(x == row).all(1).nonzero()[0, 0] for row in kept]
    assert torch.equal(types[torch.stack(index)], kinds)
    assert torch.equal(streamed(x, y, types).peak, x.abs().amax(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_is_noticed(value):
    x, y, types = rows()
    assert streamed(x, y, types).is_finite()
    x[123, 4] = value
    assert not streamed(x, y, types).is_finite()


@pytest.mark.parametrize("share", [1.0, 0.3], ids=["alone", "among others"])
def test_a_loud_row_has_no_more_say_than_one_of_twice_the_usual_energy(share):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 16, generator=generator)
    x /= x.norm(dim=1, keepdim=True)
    x[::50] *= 100
    types = (torch.rand(400, generator=generator) < share).long()
    weights = x.double().square().sum(1).clamp_min(2).reciprocal() * 2  # the usual energy is one
    moments = Moments(16, 2, torch.device("cpu"), limit=2.0)
    for part in torch.arange(400).split(100):
        moments.update(x[part], types[part])
    own = types == 1
    w, rows = weights[own, None], x[own].double()
    mean = (w * rows).sum(0) / w.sum()
    torch.testing.assert_close(moments.mean(1), mean, rtol=1e-5, atol=1e-7)
    want = (w * (rows - mean)).mT @ (rows - mean) / w.sum()
    torch.testing.assert_close(moments.covariance(1, moments.mean(1)), want, rtol=1e-4, atol=1e-6)
    assert moments.count[1] == own.sum()
    assert moments.mean(1).norm() < 0.2 < x[own].mean(0).norm()
