"""Whether the kernels of the KV cache serve a layer's states."""

from __future__ import annotations

import torch

from optimum_freeact.kernels.dispatch import ENVIRONMENT, triton_obstacle, wanted


MAX_SIZE = 256  # channels of a head that a program holds


def kv_obstacle(device: torch.device, bits: int, dtype: torch.dtype, size: int, rotated: bool) -> str | None:
    """Why the cache is read by torch, or `None` where the Triton kernels write and read it.

    Args:
        device: Of the states.
        bits (`int`): Of the cache.
        dtype (`torch.dtype`): Of the states.
        size (`int`): Channels of a head.
        rotated (`bool`): Whether states are rotated: that is other kernels.
    """
    if wanted() not in ("auto", "triton"):
        return f"{ENVIRONMENT}={wanted()}"
    if bits != 4:
        return f"kv_bits={bits}: the kernels read 4 bits"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"states in {str(dtype).removeprefix('torch.')}: the kernels multiply two-byte numbers"
    if size % 4 or size > MAX_SIZE:
        return f"head_dim={size}: the kernels need a multiple of 4 up to {MAX_SIZE}"
    if device.type != "cuda":
        return f"no kernel reads the cache on device type {device.type!r}"
    obstacle = triton_obstacle(device.index)
    if obstacle is None and wanted() == "auto":
        from optimum_freeact.kernels.kv_self_check import cache_obstacle

        obstacle = cache_obstacle(device.index, rotated)
    return obstacle
