"""Other ways to multiply 4-bit codes on a GPU, measured beside the kernels that are shipped.

`product` has the bare product and its scales, in these ways: the weight `packed` as the left operand (as shipped) or as
the `right` one, through plain loads or TMA descriptors, or expanded to one byte a weight beforehand (`rows`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.triton_state import INTERPRETED
from optimum_freeact.kernels.w4_triton import nibbles


@triton.jit
def _product(
    codes, w, scale_ptr, qscale_ptr, y_ptr, n, m,
    K: tl.constexpr, WAY: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_blocks, m_blocks = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_group = GROUP * n_blocks
    first = (pid // per_group) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    out0 = (first + (pid % per_group) % size) * BN
    token0 = ((pid % per_group) // size) * BM
    tokens, outs, k = token0 + tl.arange(0, BM), out0 + tl.arange(0, BN), tl.arange(0, BK)
    HALF: tl.constexpr = K // 2
    LEFT: tl.constexpr = WAY == "left"
    acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.int32)
    if WAY == "rows":
        for at in range(0, K, BK):
            if TMA:
                x = codes.load([token0, at])
                v = w.load([out0, at])
            else:
                x = tl.load(codes + tokens.to(tl.int64)[:, None] * K + (at + k)[None, :])
                v = tl.load(w + outs.to(tl.int64)[:, None] * K + (at + k)[None, :])
            acc = tl.dot(x, tl.trans(v), acc, out_dtype=tl.int32)
    else:
        for at in range(0, HALF, BK):
            if TMA:
                even = codes.load([token0, at])
                odd = codes.load([token0, at + HALF])
                v = w.load([out0, at])
            else:
                base = codes + tokens.to(tl.int64)[:, None] * K + (at + k)[None, :]
                even = tl.load(base)
                odd = tl.load(base + HALF)
                v = tl.load(w + outs.to(tl.int64)[:, None] * HALF + (at + k)[None, :])
            low, high = nibbles(v, PLAIN)
            if LEFT:
                acc = tl.dot(low, tl.trans(even), acc, out_dtype=tl.int32)
                acc = tl.dot(high, tl.trans(odd), acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(even, tl.trans(low), acc, out_dtype=tl.int32)
                acc = tl.dot(odd, tl.trans(high), acc, out_dtype=tl.int32)
    y = (tl.trans(acc) if LEFT else acc).to(tl.float32)
    y = y * tl.load(scale_ptr + tokens)[:, None] * tl.load(qscale_ptr + outs)[None, :]
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * m + outs[None, :], y.to(y_ptr.dtype.element_ty))


def product(
    codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, qscale: torch.Tensor, *, way: str, tma: bool,
    BM: int, BN: int, BK: int, warps: int, stages: int, group: int = 8,
) -> torch.Tensor:  # fmt: skip
    """Scaled product `(n, m)` in bfloat16; sizes are multiples of the blocks. Unsigned nibbles: off by 8 sums of codes."""
    n, m = len(codes), len(weight)
    y = torch.empty(n, m, dtype=torch.bfloat16, device=codes.device)
    x, w = codes, weight
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x, w = TensorDescriptor.from_tensor(codes, [BM, BK]), TensorDescriptor.from_tensor(weight, [BN, BK])
    _product[(triton.cdiv(n, BM) * triton.cdiv(m, BN),)](
        x, w, scale, qscale, y, n, m, K=codes.shape[1], WAY=way, TMA=tma, BM=BM, BN=BN, BK=BK, GROUP=group,
        PLAIN=INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def float8_product(codes, weight_f8, scale, qscale, fast: bool = False) -> torch.Tensor:
    """The same through `torch._scaled_mm` on codes as e4m3, exact without fast accumulation (Hopper and later)."""
    x = codes if codes.dtype == torch.float8_e4m3fn else codes.to(torch.float8_e4m3fn)
    return torch._scaled_mm(
        x, weight_f8.t(), scale_a=scale.unsqueeze(1), scale_b=qscale.unsqueeze(0), out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )  # fmt: skip
