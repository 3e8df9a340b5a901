import pytest
import torch

from optimum_freeact.numerics.matrix_mean import damped, inverse_geometric_mean, spd_power


def positive(n, *batch, condition=100.0):
    basis = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64)).Q
    values = torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    return (basis * values) @ basis.mT


def energy_product(a, c, h):
    """tr(A^T C A) tr(A^-1 H A^-T): what uniform rounding of activations and weights pays."""
    inverse = torch.linalg.inv(a)
    return (a.mT @ c @ a).trace() * (inverse @ h @ inverse.mT).trace()


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_powers(n, batch):
    matrix = positive(n, *batch)
    eye = torch.eye(n, dtype=torch.float64).expand_as(matrix)
    root, inverse_root = spd_power(matrix, 0.5), spd_power(matrix, -0.5)
    torch.testing.assert_close(root @ root, matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_root @ matrix @ inverse_root, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(spd_power(matrix, -1.0), torch.linalg.inv(matrix), rtol=0, atol=1e-10)
    torch.testing.assert_close(spd_power(matrix, 1.0), matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_singular_matrices_are_finite(dtype):
    vector = torch.randn(6, 1, dtype=dtype)
    assert spd_power(vector @ vector.mT, -0.5).isfinite().all()
    assert spd_power(torch.zeros(3, 3, dtype=dtype), -0.5).isfinite().all()


def test_powers_use_the_symmetric_part():
    matrix = positive(5)
    skew = torch.randn(5, 5, dtype=torch.float64)
    torch.testing.assert_close(spd_power(matrix + skew - skew.mT, 0.5), spd_power(matrix, 0.5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 7, 24])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_mean_solves_its_equation(n, batch):
    c, h = positive(n, *batch), positive(n, *batch)
    g = inverse_geometric_mean(c, h)
    torch.testing.assert_close(g @ c @ g, h, rtol=0, atol=1e-9 * h.abs().max().item())
    torch.testing.assert_close(g, g.mT, rtol=0, atol=1e-10 * g.abs().max().item())
    assert (torch.linalg.eigvalsh(g) > 0).all()


def test_commuting_matrices_have_a_closed_form():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    c, h = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    g = inverse_geometric_mean((basis * c) @ basis.mT, (basis * h) @ basis.mT)
    torch.testing.assert_close(g, (basis * (h / c).sqrt()) @ basis.mT, rtol=0, atol=1e-12)


def test_equal_and_inverse_arguments():
    c = positive(5)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(inverse_geometric_mean(c, c), eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_geometric_mean(c, torch.linalg.inv(c)), torch.linalg.inv(c), rtol=0, atol=1e-9)
    swapped = torch.linalg.inv(inverse_geometric_mean(c, h := positive(5)))
    torch.testing.assert_close(inverse_geometric_mean(h, c), swapped, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(inverse_geometric_mean(4 * c, 9 * h), inverse_geometric_mean(c, h) * 1.5)


def test_congruence():
    """Changing coordinates, x -> x B and w -> w B^-T, changes the mean as it changes A A^T."""
    c, h, b = positive(6), positive(6), torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6).double()
    inverse = torch.linalg.inv(b)
    there = inverse_geometric_mean(b.mT @ c @ b, inverse @ h @ inverse.mT)
    torch.testing.assert_close(there, inverse @ inverse_geometric_mean(c, h) @ inverse.mT, rtol=1e-8, atol=1e-8)


def test_no_perturbation_lowers_the_energy_product():
    c, h = positive(8), positive(8)
    a = torch.linalg.cholesky(inverse_geometric_mean(c, h))
    best = energy_product(a, c, h)
    # the minimum in closed form: tr((C^1/2 H C^1/2)^1/2)^2
    root = spd_power(c, 0.5)
    torch.testing.assert_close(best, spd_power(root @ h @ root, 0.5).trace().square(), rtol=1e-10, atol=0)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(energy_product(a @ rotation, c, h), best, rtol=1e-10, atol=0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            direction = torch.randn(8, 8, dtype=torch.float64)
            perturbed = a + size * a.norm() / direction.norm() * direction
            assert energy_product(perturbed, c, h) >= best * (1 - 1e-12)
    assert energy_product(torch.eye(8, dtype=torch.float64), c, h) > 1.05 * best  # there was something to gain


def test_damping():
    matrix = positive(4, 3)
    before = matrix.clone()
    share = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * 0.01 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(damped(matrix, 0.01), matrix + share, rtol=0, atol=1e-12)
    zero = torch.zeros(2, 4, 4, dtype=torch.float64)
    assert torch.equal(damped(zero), torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    mixed = damped(torch.stack((zero[0], matrix[0])))  # each matrix by its own diagonal
    assert torch.equal(mixed[0], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(mixed[1], damped(matrix[0]))
    vector = torch.randn(4, 1, dtype=torch.float64)
    assert (torch.linalg.eigvalsh(damped(vector @ vector.mT)) > 0).all()
    assert torch.equal(matrix, before)
