"""Fit the experts of a block: shared maps from all tokens, each expert's rounding from the tokens that reach it.

Second moments of an expert's own tokens count by their number against the width of the input, the block's by the width: an
expert that few tokens reach is rounded as all tokens would have it, one that many reach as its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from optimum_freeact.calibration.checks import check_moments
from optimum_freeact.calibration.choices import (
    MIN_ROWS_PER_TYPE,
    fake_rows,
    is_shrunk,
    map_spec,
    output_biases,
    round_weight,
    search_clip,
)
from optimum_freeact.calibration.records import InputRecord
from optimum_freeact.calibration.stream import NO_TYPE, Stream
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.experts import FreeActExperts, plain_weights
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.finite import all_finite
from optimum_freeact.transforms.affine_map import InputMap, pick
from optimum_freeact.transforms.correction import shrunk_weight
from optimum_freeact.transforms.fit import fit_map, gather_statistics


class Routed:
    """Calibration tokens at the experts of a block: rows `(n, hidden)`, types `(n,)` and experts `(n, k)`."""

    def __init__(self, rows: torch.Tensor, types: torch.Tensor, experts: torch.Tensor):
        self.rows, self.types, self.experts = rows, types, experts

    def of(self, expert: int) -> torch.Tensor:
        """Positions of the tokens that reach an expert."""
        return (self.experts == expert).any(1).nonzero().flatten()


@torch.no_grad()
def routed_tokens(stream: Stream, block: nn.Module, index: int, module: nn.Module) -> Routed:
    """What reaches the experts in the block as it is now, on all batches."""
    seen: list[tuple] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    parts = []
    try:
        for i, batch in enumerate(stream.batches):
            stream.run(block, index, i)
            rows, experts = seen.pop()[:2]
            types = stream._types(batch, rows)
            real = types != NO_TYPE
            parts.append((rows.flatten(0, -2).float()[real], types[real], experts.reshape(len(types), -1)[real]))
    finally:
        hook.remove()
    return Routed(*(torch.cat(part) for part in zip(*parts, strict=True)))


class _Shared(NamedTuple):
    """What all experts of one product have in common: the moments and map of their input, and sample rows of it.

    `z` are the transformed rows, `noise` what rounding adds to them, `types` their token types.
    """

    moments: Moments
    stored: InputMap
    block_moments: torch.Tensor
    z: torch.Tensor
    noise: torch.Tensor
    types: torch.Tensor


class ExpertsFit:
    """The experts of one block on their way to being quantized.

    Args:
        name (`str`): Of the module, for the record and messages.
        target ([`FreeActExperts`]): Empty, on the device of the fit.
        weights: Both products of all experts: `weights[product][expert]` is weight and bias, full precision.
        routed ([`Routed`]): The calibration tokens.
        config ([`FreeActConfig`]): Settings.
    """

    def __init__(self, name: str, target: FreeActExperts, weights: list, routed: Routed, config: FreeActConfig):
        self.name, self.target, self.weights, self.routed, self.config = name, target, weights, routed, config

    @torch.no_grad()
    def closed_form(self, generator: torch.Generator) -> list[InputRecord]:
        """Fit both products; `generator` draws the rotations."""
        routed, target = self.routed, self.target
        firsts, seconds = target.linears()
        tokens = [routed.of(expert) for expert in range(target.num_experts)]
        records = [self._fit(0, firsts, [(routed.rows[t], routed.types[t]) for t in tokens], generator)]
        inner = []
        for (weight, bias), t in zip(self.weights[0], tokens, strict=True):
            y = nn.functional.linear(routed.rows[t], weight.float(), None if bias is None else bias.float())
            inner.append((target.gate(y), routed.types[t]))
        return [*records, self._fit(1, seconds, inner, generator)]

    def _fit(
        self, product: int, linears: list[FreeActLinear], inputs: list[tuple[torch.Tensor, torch.Tensor]], generator
    ) -> InputRecord:
        """One product of all experts from the rows that reach each."""
        config, weights = self.config, self.weights[product]
        name = f"{self.name}.{self.target.names[product]}"
        source: FreeActInput = linears[0].source
        moments = self._moments(source, inputs, name)
        spec = map_spec(config, 0 if source.basis is None else source.basis.shape[1])
        stats = gather_statistics(moments, [weight.float() for weight, _ in weights], spec)
        source.store(fit_map(stats, spec, generator))
        stored = source.input_map(torch.float64)
        kept, kept_types = moments.rows
        z, _ = stored.apply(kept.double(), kept_types)
        transformed = [stored.transform_weight(weight.double()) for weight, _ in weights]
        self._clip(source, z, kept_types, [v for v, _ in transformed])
        noise = fake_rows(z, config, pick(source.clip.double().unsqueeze(-1), kept_types)) - z
        shared = _Shared(moments, stored, stored.transform_moments(stats.c), z, noise, kept_types)
        sums = torch.zeros(3, device=z.device).double()  # errors by activations and by weights, energy
        for linear, weight, own, found in zip(linears, weights, inputs, transformed, strict=True):
            sums += self._round(linear, weight, own, found, shared)
        energy = kept.double().square().sum()
        left = stored.centre(kept.double(), kept_types).square().sum()
        return InputRecord(
            linears=[name],
            clip=source.clip.tolist(),
            rank=0 if source.basis is None else source.basis.shape[1],
            mean_share=float(1 - left / energy.clamp_min(1e-30)),
            activation_error=float(sums[0] / sums[2].clamp_min(1e-30)),
            weight_error=float(sums[1] / sums[2].clamp_min(1e-30)),
        )

    def _moments(self, source: FreeActInput, inputs: list[tuple[torch.Tensor, torch.Tensor]], name: str) -> Moments:
        """Of the rows of all experts, in a random order: what moments take from the first rows, and evenly from each part, is of all."""
        config = self.config
        rows, types = (torch.cat(part) for part in zip(*inputs, strict=True))
        peaks = config.channel_scale == "smoothquant"
        moments = Moments(source.in_features, config.n_types, source.clip.device, peaks=peaks, limit=config.loudest)
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).to(rows.device)
        for part in shuffled.chunk(8):
            moments.update(rows[part], types[part])
        check_moments(moments, name)
        return moments

    def _clip(self, source: FreeActInput, z: torch.Tensor, types: torch.Tensor, weights: list[torch.Tensor]) -> None:
        """Store the clip of each type, by what rounding `z` costs the outputs of all experts together."""
        gram = sum(v.mT @ v for v in weights)
        floor = 1e-9 * gram.diagonal().mean().clamp_min(1e-30)
        root = torch.linalg.cholesky(gram + floor * torch.eye(source.in_features, device=z.device))
        pooled = self.config.pooled_types
        clip = search_clip(z, root.mT, torch.tensor(pooled, device=z.device)[types], self.config)
        source.clip.copy_(torch.tensor([clip[kind] for kind in pooled]))

    def _round(self, linear: FreeActLinear, weight, own, transformed, shared: _Shared) -> torch.Tensor:
        """Fill one expert's linear; returns its errors by activations and by weights, and its outputs' energy, on sample rows."""
        config, (plain, bias), (rows, types), (v, low_rank) = self.config, weight, own, transformed
        variance = shared.noise[shared.types == 0].square().mean().nan_to_num()
        moments_z = _mixed(shared.stored, rows, types, shared.block_moments)
        moments_z = (moments_z + moments_z.mT) / 2
        wanted = shrunk_weight(v, moments_z, variance) if is_shrunk(config, shared.moments) else v
        spread = variance if config.rounding_noise else 0.0
        moments_z = moments_z + spread * torch.eye(v.shape[1], device=v.device, dtype=torch.float64)
        rounded = round_weight(wanted, moments_z, config)
        linear.set_weight(*(rounded if rounded is not None else (wanted.unsqueeze(1), None)))
        biases = output_biases(shared.moments, shared.stored, plain.double(), None if bias is None else bias.double())
        if biases is not None:
            linear.set_bias_rows(biases)
        if low_rank is not None:
            linear.set_low_rank(low_rank)
        used = linear.transformed_weight(torch.float64)
        self._balance(linear, shared.stored, rows, types, v, used)
        products = (shared.noise @ v.mT, shared.z @ (used - v).mT, shared.z @ v.mT)
        return torch.stack([product.square().sum() for product in products])

    def _balance(self, linear: FreeActLinear, stored: InputMap, own, types, v, used) -> None:
        """Add to an expert's biases what rounding takes from its mean output on its own tokens, type by type."""
        means = linear.bias_rows()
        if (
            len(own) == 0
            or means is None
            or self.config.centring == "none"
            or self.config.activation_bits == 16 == self.config.weight_bits
        ):
            return
        some = torch.linspace(0, len(own) - 1, min(512, len(own)), device=own.device).long()
        z, _ = stored.apply(own[some].double(), types[some])
        ratios = pick(linear.source.clip.double().unsqueeze(-1), types[some])
        lost = z @ v.mT - fake_rows(z, self.config, ratios) @ used.mT
        biases, pooled = means.double(), torch.tensor(self.config.pooled_types, device=types.device)
        for kind in range(len(biases)):
            rows = pooled[types[some]] == pooled[kind]
            if int(rows.sum()) >= MIN_ROWS_PER_TYPE:
                biases[kind] += lost[rows].mean(0)
        linear.set_bias_rows(biases)


def _mixed(stored: InputMap, rows: torch.Tensor, types: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Second moments of z of an expert's own tokens, as far as there are enough, and of the block's."""
    if len(rows) == 0:
        return block
    z, _ = stored.apply(rows, types) if rows.dtype == torch.float64 else stored.to(torch.float32).apply(rows, types)
    own = (z.mT @ z).double() / len(rows)
    scale = block.diagonal().mean() / own.diagonal().mean().clamp_min(1e-30)  # one sink token must not decide
    share = len(rows) / (len(rows) + len(block))
    return share * scale * own + (1 - share) * block


@torch.no_grad()
def fit_experts(
    block: nn.Module, name: str, make, routed: Routed, config: FreeActConfig, generator: torch.Generator, prefix: str
) -> list[InputRecord]:
    """Replace a block's experts by quantized ones, fitted; `make` makes them empty."""
    plain = block.get_submodule(name)
    for parameter_name, parameter in plain.named_parameters(recurse=False):
        if not all_finite(parameter):
            raise ValueError(
                f"The weight of '{prefix}.{name}.{parameter_name}' holds NaN or inf: repair it before quantizing."
            )
    pairs = [list(plain_weights(plain, expert)) for expert in range(plain.num_experts)]
    weights = [
        [(w.detach(), None if b is None else b.detach()) for w, b in product] for product in zip(*pairs, strict=True)
    ]
    target = make()
    return ExpertsFit(f"{name}", target, weights, routed, config).closed_form(generator)
