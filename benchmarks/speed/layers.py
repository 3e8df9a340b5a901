"""Random layers of one shape, of every provider: what `linear.py` and `roof.py` time."""
# ruff: noqa: B008

from __future__ import annotations

import torch
from torch import nn

from benchmarks.speed import alternatives
from benchmarks.speed.llama import FakeQuantizedLinear
from benchmarks.speed.timing import copies_for, kept
from optimum_freeact.kernels import ops
from optimum_freeact.kernels.reference import Rows, split_columns
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair
from optimum_freeact.presets import PRESETS
from optimum_freeact.transforms.affine_map import InputMap
from optimum_freeact.type_state import TypeState


class Shape:
    """Random layers of one shape, as many as exceed the cache, of every provider."""

    def __init__(self, d: int, m: int, device: str, cache: int):
        self.d, self.m, self.device, self.cache = d, m, device, cache
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = (flat_rotation(n, generator).float().to(device) for n in factor_pair(d))

    def copies(self, n_bytes: float) -> int:
        return copies_for(int(n_bytes), self.cache)

    @kept
    def bf16(self) -> list[torch.Tensor]:
        return [self.random_weight() for _ in range(self.copies(2 * self.d * self.m))]

    def random_weight(self) -> torch.Tensor:
        return (torch.randn(self.m, self.d, device=self.device) * 0.02).bfloat16()

    @kept
    def layers(self, tier: str) -> list[FreeActLinear]:
        """Layers with the parts of a preset and two token types; one input side (as a model would cycle through its own)."""
        preset = PRESETS[tier]
        rank, groups = preset["low_rank"], preset.get("weight_group_size")
        source = FreeActInput(
            self.d, n_types=2, n_means=2, channel_scale=False, rank=rank, transform="hadamard", bits=4,
            symmetric=False, n_readers=1, state=TypeState(), group_size=preset.get("activation_group_size"),
        ).to(self.device)  # fmt: skip
        basis = torch.linalg.qr(torch.randn(self.d, rank, device=self.device))[0] if rank else None
        source.store(InputMap(torch.randn(2, self.d, device=self.device) * 0.1, None, basis, self.left, self.right))
        source.clip.fill_(0.9)
        layers = []
        for _ in range(self.copies(0.5 * self.d * self.m)):
            layer = FreeActLinear(self.d, self.m, source, bits=4, group_size=groups or self.d, bias=False)
            layer = layer.to(self.device)
            layer.weight.data.random_(0, 256)
            layer.qscale.fill_(0.02 / 4.6 / (73 if groups else 1))
            if groups:
                layer.weight_group_scale.random_(-127, 128)
            if rank:
                layer.low_rank.random_(-127, 128)
                layer.low_rank_scale.fill_(0.02 / 73)
            layer.type_bias.normal_(std=0.02)
            layer.prepare()
            layers.append(layer)
        source.prepare()
        return layers

    @kept
    def x(self, n: int) -> torch.Tensor:
        return torch.randn(n, self.d, device=self.device).bfloat16()

    @kept
    def types(self, n: int) -> torch.Tensor:
        types = torch.zeros(1, n, dtype=torch.long, device=self.device)
        types[0, 0] = 1
        return types

    @kept
    def rows(self, n: int, tier: str) -> Rows:
        layer = self.layers(tier)[0]
        layer.source.state.types = self.types(n)
        found = layer.source(self.x(n).unsqueeze(0))
        return Rows(found.codes, found.stats, found.branch)

    # what is measured: lists of calls on different weights
    def whole(self, n: int, tier: str):
        x, layers = self.x(n).unsqueeze(0), self.layers(tier)
        layers[0].source.state.types = self.types(n)
        return [lambda layer=layer: layer(x) for layer in layers]

    def whole_bf16(self, n: int):
        return [lambda w=w: nn.functional.linear(self.x(n), w) for w in self.bf16()]

    def whole_fake(self, n: int):
        layers = [FakeQuantizedLinear(w, self.left.bfloat16(), self.right.bfloat16()) for w in self.bf16()]
        return [lambda layer=layer: layer(self.x(n)) for layer in layers]

    def whole_int4_weight_only(self, n: int):
        """torch's own 4-bit weight-only product, which torchao uses on CUDA; groups of 128."""
        calls = []
        for _ in range(self.copies(0.5 * self.d * self.m)):
            codes = torch.randint(0, 256, (self.m, self.d // 2), dtype=torch.uint8, device=self.device)
            packed = torch._convert_weight_to_int4pack(codes, 8)
            scales = torch.rand(self.d // 128, self.m, 2, device=self.device).bfloat16()
            calls.append(lambda p=packed, s=scales: torch._weight_int4pack_mm(self.x(n), p, 128, s))
        return calls

    def whole_int8_dynamic(self, n: int):
        """8-bit weights, 8-bit activations rounded per token, as torchao's dynamic quantization; compiled as it advises."""
        weights = [torch.randint(-127, 128, (self.m, self.d), dtype=torch.int8, device=self.device) for _ in range(2)]
        scale = torch.rand(self.m, device=self.device)

        @torch.compile(dynamic=False)
        def linear(x, w):
            peak = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-6) / 127
            codes = torch.round(x.float() / peak).to(torch.int8)
            return (torch._int_mm(codes, w.t()).float() * peak * scale).bfloat16()

        return [lambda w=w: linear(self.x(n), w) for w in weights]

    def part_round(self, n: int, tier: str):
        """Everything before the product."""
        x, source = self.x(n).unsqueeze(0), self.layers(tier)[0].source
        source.state.types = self.types(n)
        return [lambda: source(x)]

    def part_product(self, n: int, tier: str):
        """The product with all that follows it."""
        rows, types = self.rows(n, tier), self.types(n).flatten()
        return [
            lambda w=layer.kernel_weight(): ops.w4_linear(*rows, types, *w, torch.bfloat16)
            for layer in self.layers(tier)
        ]

    def part_bare_product(self, n: int):
        """The product and its scales only, to be held against a library's."""
        rows = self.rows(n, "freeact-fast")
        return [
            lambda w=layer.kernel_weight()._replace(low_rank=None, low_rank_scale=None, type_bias=None, type_columns=None): (
                ops.w4_linear(rows.codes, rows.stats, rows.branch, None, *w, torch.bfloat16)
            )
            for layer in self.layers("freeact-fast")
        ]

    def part_copy(self, n: int):
        """The rows read and written once, which a rounding cannot do without but for the bytes that it writes."""
        x, target = self.x(n), torch.empty_like(self.x(n))
        return [lambda: target.copy_(x)]

    def part_float8(self, n: int):
        """`torch._scaled_mm` on the same codes, exact accumulation; weights of one byte."""
        rows, layers = self.rows(n, "freeact-fast"), self.layers("freeact-fast")
        x, stats = rows.codes.to(torch.float8_e4m3fn), rows.stats
        layers = layers[: max(1, len(layers) // 2)]
        weights = [split_columns(layer.codes()).to(torch.float8_e4m3fn) for layer in layers]
        return [
            lambda w=w, q=layer.qscale.flatten(): alternatives.float8_product(x, w, stats[0], q)
            for w, layer in zip(weights, layers)
        ]
