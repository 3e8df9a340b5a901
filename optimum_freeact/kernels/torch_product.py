"""Products of codes by torch alone, where no kernel of this package runs, and what they are called.

`torch._int_mm` multiplies `int8` matrices exactly into `int32`: on CPUs with VNNI through oneDNN (any shape), on CUDA
with at least 17 rows and sizes divisible by 8. On a CPU without VNNI it is a scalar loop (measured, AVX2 machine, 2048 x
576 by 576 x 1536, one thread: 4800 ms against 158 ms in float32). There, and for other shapes and devices, the product
runs in float32, which is exact while `in_features * 2^(bits_a + bits_w - 2) < 2^24`: for 4-bit operands up to 262144
columns.
"""

from __future__ import annotations

import torch

from optimum_freeact.kernels.asked_once import asked_once


CUDA_MIN_ROWS = 32  # _int_mm refuses 16 rows and fewer; 32 keeps tiles whole


@asked_once  # what it asks cannot be traced
def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies bytes in hardware (AVX-512 VNNI or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_avx512_vnni_supported"))
    return any(check() for check in checks if check is not None)


def int_linear(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`codes @ weight.T` over integers.

    Args:
        codes (`torch.Tensor`, `int8`, shape `(n, in)`): Activation codes.
        weight (`torch.Tensor`, `int8`, shape `(out, in)`, contiguous): Weight codes. It is passed on as a transposed
            view: a contiguous `(in, out)` copy is up to 8 times slower on CPU at one row.

    Returns:
        `torch.Tensor` of shape `(n, out)`, `int32` where the product is an integer one, else `float32`.
    """
    rows, width = codes.shape
    if rows == 0:
        return codes.new_zeros((0, weight.shape[0]), dtype=torch.int32)
    if codes.device.type == "cpu" and cpu_has_vnni():
        return torch._int_mm(codes, weight.t())
    if codes.device.type == "cuda" and width % 8 == 0 and weight.shape[0] % 8 == 0:
        if rows < CUDA_MIN_ROWS:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, CUDA_MIN_ROWS - rows))
        return torch._int_mm(codes, weight.t())[:rows]
    return codes.float() @ weight.float().t()


def torch_product(device: torch.device, layer: dict) -> tuple[str, str]:
    """Torch's product on a device, and the reason."""
    if layer.get("weight_bits") == 16 or layer.get("activation_bits") == 16:
        return "product of dequantized values", "one side has 16 bits, so it is no integer"
    if layer.get("group_size") is not None:
        return "product of dequantized values", "integer products need one scale per output channel"
    if layer.get("activation_group_size") is not None:
        return "product of dequantized values", "integer products need one grid per token"
    return describe(device)


def describe(device: torch.device | str) -> tuple[str, str]:
    """Which product [`int_linear`] runs on a device, and why, for reports.

    Returns:
        `tuple[str, str]`: The product's name, and the reason in one line.
    """
    kind = torch.device(device).type
    if kind == "cpu" and cpu_has_vnni():
        return "torch._int_mm (int8)", "this CPU multiplies bytes in hardware (VNNI or AMX)"
    if kind == "cpu":
        return (
            "float32 product of the codes (exact)",
            "this CPU has no VNNI, without which int8 products run as scalars",
        )
    if kind == "cuda":
        return "torch._int_mm (int8)", "CUDA tensor cores; inputs or outputs not divisible by 8 run in float32 instead"
    return "float32 product of the codes (exact)", f"no integer product is known for device type {kind!r}"
