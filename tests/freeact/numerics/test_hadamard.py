import pytest
import torch

from optimum_freeact.numerics.hadamard import flat_rotation, hadamard_matrix, random_orthogonal


# widths and Kronecker factors of SmolLM2, Qwen2.5, Llama and Gemma
REAL_SIZES = [12, 16, 24, 28, 32, 36, 48, 64, 76, 96, 112, 128, 148]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_orders_up_to_148():
    """Every constructed matrix is one; the orders without are known, and none is a size of a real model."""
    missing = []
    for n in range(1, 149):
        matrix = hadamard_matrix(n)
        if matrix is None:
            missing.append(n)
            continue
        assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
        assert torch.equal(matrix @ matrix.mT, n * torch.eye(n, dtype=torch.float64))
    assert [n for n in missing if n % 4 == 0] == [52, 92, 100, 116]
    assert [n for n in range(1, 149) if n not in missing and n % 4] == [1, 2]
    assert not set(missing) & set(REAL_SIZES)


@pytest.mark.parametrize("n", [256, 576, 1536, 2048])
def test_whole_widths(n):
    matrix = hadamard_matrix(n)
    assert torch.equal(matrix @ matrix.mT, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4])
def test_orders_that_mean_nothing(n):
    with pytest.raises(ValueError, match=f"positive order, got {n}"):
        hadamard_matrix(n)


@pytest.mark.parametrize("n", [1, 2, 7, 18, 24, 52, 64, 86, 148])
def test_flat_rotation_is_orthogonal_and_seeded(n):
    rotation = flat_rotation(n, generator())
    assert rotation.dtype == torch.float64
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(rotation, flat_rotation(n, generator()))
    if n > 2:
        assert not torch.equal(rotation, flat_rotation(n, generator(1)))


@pytest.mark.parametrize("n", REAL_SIZES)
def test_entries_are_even_where_a_hadamard_matrix_exists(n):
    torch.testing.assert_close(flat_rotation(n, generator()).abs(), torch.full((n, n), n**-0.5).double())


@pytest.mark.parametrize(("n", "power"), [(18, 2), (86, 2), (52, 4), (7, 1)])
def test_elsewhere_they_are_flatter_by_the_power_of_two(n, power):
    """A unit vector is spread over at least `power` entries of equal size."""
    largest = flat_rotation(n, generator()).abs().max(dim=1).values
    assert (largest <= power**-0.5 + 1e-12).all()


@pytest.mark.parametrize("n", [1, 2, 5, 43])
def test_random_orthogonal(n):
    matrix = random_orthogonal(n, generator())
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert matrix.is_contiguous()


def test_random_orthogonal_has_no_preferred_direction():
    """Haar: the mean is zero and E[q_ij^2] = 1/n (without the sign fix the diagonal has one sign)."""
    source = generator()
    samples = torch.stack([random_orthogonal(3, source) for _ in range(4000)])
    assert samples.mean(0).abs().max() < 0.05
    assert (samples.square().mean(0) - 1 / 3).abs().max() < 0.03
