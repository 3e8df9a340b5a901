"""Gluon: nibbles of bytes as operands of tensor cores, in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def low_codes(w):
    """Sixteen times the codes in the low nibbles (code + 8) of bytes."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 b; shl.b32 b, $1, 4; lop3.b32 $0, b, 0xF0F0F0F0, 0x80808080, 0x6A; }",
        "=r,r", [w], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def high_codes(w):
    """Sixteen times the codes in the high nibbles."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;", "=r,r", [w], dtype=gl.int8, is_pure=True, pack=4
    )


_UNPACK = """{ .reg .b32 l, h, k;
    mov.b32 k, 0x64086408;
    and.b32 l, $4, 0x0F0F0F0F;
    shr.u32 h, $4, 4;
    and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, l, 0x64646464, 0x4140;
    prmt.b32 $1, l, 0x64646464, 0x4342;
    prmt.b32 $2, h, 0x64646464, 0x4140;
    prmt.b32 $3, h, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, k;
    sub.f16x2 $1, $1, k;
    sub.f16x2 $2, $2, k;
    sub.f16x2 $3, $3, k;"""
_SCALE = """
    mul.f16x2 $0, $0, $5;
    mul.f16x2 $1, $1, $6;
    mul.f16x2 $2, $2, $5;
    mul.f16x2 $3, $3, $6;"""
UNPACKED = gl.constexpr(_UNPACK + " }")
SCALED = gl.constexpr(_UNPACK + _SCALE + " }")


@gluon.jit
def half_codes(w):
    """Codes in the low and high nibbles of bytes, as float16: a nibble in the last bits of 1024 is 1024 and as much."""
    return gl.inline_asm_elementwise(
        UNPACKED, "=&r,=&r,=&r,=&r,r", [w], dtype=(gl.float16, gl.float16), is_pure=True, pack=4
    )


@gluon.jit
def scaled_codes(w, scale, layout: gl.constexpr, OWN: gl.constexpr, BK: gl.constexpr, GB: gl.constexpr):
    """[`half_codes`] of bytes (OWN, BK) times the scales (OWN, BK / GB) of their groups."""
    w = w.reshape([OWN, BK // GB, GB])
    w, scale = gl.broadcast(w, gl.expand_dims(scale, 2))
    low, high = gl.inline_asm_elementwise(
        SCALED, "=&r,=&r,=&r,=&r,r,r,r", [w, scale], dtype=(gl.float16, gl.float16), is_pure=True, pack=4
    )
    low = gl.convert_layout(low.reshape([OWN, BK]), layout)
    return low, gl.convert_layout(high.reshape([OWN, BK]), layout)
