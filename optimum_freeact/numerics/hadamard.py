"""Hadamard matrices by construction (Sylvester, Paley I and II) and random orthogonal matrices.

Sizes of real models split into factors that these constructions cover: 24, 28, 32, 36, 48, 64, 76, 112, 128, 148. Where no
Hadamard matrix is constructed (86 of 11008 = 86 x 128) the odd part is a random orthogonal matrix.
"""

from __future__ import annotations

import torch


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> torch.Tensor:
    """Matrix of quadratic characters chi(i - j) over the integers modulo the prime `q`."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[[(i * i) % q for i in range(1, q)]] = 1.0
    chi[0] = 0.0
    index = torch.arange(q)
    return chi[(index[:, None] - index[None, :]) % q]


def _paley_1(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q = 3 (mod 4): identity plus a skew conference matrix."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_2(q: int) -> torch.Tensor:
    """Order 2(q + 1) for a prime q = 1 (mod 4): a symmetric conference matrix with 2 x 2 blocks substituted."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1.0, 1.0, _jacobsthal(q)
    off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, off_diagonal) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def hadamard_matrix(n: int) -> torch.Tensor | None:
    """A Hadamard matrix of order `n` (entries +-1, float64), or `None` where no construction here reaches it."""
    if n < 1:
        raise ValueError(f"a Hadamard matrix has a positive order, got {n}.")
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return _paley_1(n - 1)
    if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return _paley_2(n // 2 - 1)
    half = hadamard_matrix(n // 2)
    return None if half is None else torch.kron(hadamard_matrix(2), half)


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal matrix with Haar distribution (QR of a Gaussian with the signs fixed), float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * torch.sign(r.diagonal())).contiguous()


def flat_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal matrix of size `n` whose entries are as even as can be: a Hadamard matrix over sqrt(n) with random
    signs and rows permuted; where none is constructed, (largest power of two) x (random orthogonal remainder).
    """
    matrix = hadamard_matrix(n)
    if matrix is None:
        power = n & -n
        matrix = torch.kron(
            hadamard_matrix(power), (random_orthogonal(n // power, generator) * (n // power) ** 0.5).contiguous()
        )
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    order = torch.randperm(n, generator=generator)
    return signs[:, None] * matrix[order] / n**0.5
