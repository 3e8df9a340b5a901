"""Random layers of any shape for kernel tests: an input side, a weight, and rows to send through."""

from dataclasses import fields
from typing import NamedTuple

import torch

from optimum_freeact.kernels.reference import SCALE_OUTPUTS, Weight
from optimum_freeact.kernels.tables import InputTables, make_tables
from optimum_freeact.numerics.byte_rows import column_codes
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair
from optimum_freeact.numerics.packing import pack
from optimum_freeact.transforms.affine_map import InputMap


class Side(NamedTuple):
    found: InputMap  # as stored, float32
    tables: InputTables
    clip: torch.Tensor


def input_side(
    d: int, *, rank: int = 4, n_types: int = 2, means: bool = True, channel: bool = True, bits: int = 4,
    symmetric: bool = False, seed: int = 0, group: int = 0,
) -> Side:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    a, b = factor_pair(d)
    mean = (torch.randn(n_types, d, generator=generator) * 2).bfloat16() if means else None
    scale = torch.rand(d, generator=generator) + 0.5 if channel else None
    codes = code_scale = basis = None
    if rank:
        exact = torch.linalg.qr(torch.randn(d, rank, generator=generator))[0]
        codes, code_scale = column_codes(exact)
        basis = codes.float() * code_scale
    left, right = (flat_rotation(size, generator).float() for size in (a, b))
    clip = torch.linspace(0.8, 0.95, n_types)
    found = InputMap(None if mean is None else mean.float(), scale, basis, left, right)
    return Side(found, make_tables(found, codes, code_scale, clip, bits, symmetric, group), clip)


def means_of(tables: InputTables) -> int:
    return 0 if tables.mean is None else len(tables.mean)


def rows_of(n: int, d: int, n_types: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.exp(torch.randn(d, generator=generator))
    types = torch.randint(0, n_types, (n,), generator=generator)
    return x.bfloat16(), types


def random_weight(m: int, d: int, *, rank: int = 4, n_bias: int = 2, seed: int = 2, group: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (m, d), generator=generator)
    low_rank = torch.randint(-127, 128, (m, rank), dtype=torch.int8, generator=generator) if rank else None
    return Weight(
        packed=pack(codes.unsqueeze(1), 4).squeeze(1),
        qscale=torch.rand(m, generator=generator) * 0.01 + 0.001,
        row_sum=codes.sum(1, dtype=torch.int32),
        low_rank=low_rank,
        low_rank_scale=torch.rand(rank, generator=generator) * 0.01 if rank else None,
        type_bias=torch.randn(n_bias, m, generator=generator) if n_bias else None,
        group_scale=torch.randint(-127, 128, (m, d // group), dtype=torch.int8, generator=generator)
        if group
        else None,
    )


def of_several_linears(weight: Weight) -> Weight:
    """The same with scales of the branch for each block of outputs."""
    generator = torch.Generator().manual_seed(7)
    m, rank = weight.low_rank.shape
    return weight._replace(low_rank_scale=torch.rand(m // SCALE_OUTPUTS, rank, generator=generator) * 0.01)


def to(thing, device):
    """A dataclass or tuple of tensors on a device."""
    names = thing._fields if hasattr(thing, "_fields") else [field.name for field in fields(thing)]
    values = {name: getattr(thing, name) for name in names}
    return type(thing)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})
