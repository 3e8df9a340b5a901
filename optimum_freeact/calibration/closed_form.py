"""Fit one group of linears (those that share an input) from its moments and put the result into its modules."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from optimum_freeact.calibration.choices import (
    MIN_ROWS_PER_TYPE,
    fake_rows,
    is_shrunk,
    map_spec,
    output_biases,
    round_weight,
    search_clip,
)
from optimum_freeact.calibration.exclusive_fit import choose_exclusive
from optimum_freeact.calibration.records import InputRecord
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.branch_rank import type_rank_of
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.moments import Moments, loudness_of_types
from optimum_freeact.numerics.metrics import relative_error_of_tokens
from optimum_freeact.rounding.rtn import RoundedWeight
from optimum_freeact.transforms.affine_map import InputMap, pick
from optimum_freeact.transforms.compensation import Compensation
from optimum_freeact.transforms.correction import corrected_weight, shrunk_weight
from optimum_freeact.transforms.exclusive import fixed_blocks, share_of
from optimum_freeact.transforms.fit import InputStatistics, fit_map, gather_statistics
from optimum_freeact.type_rules import SINK


# Half the way: on SmolLM2 the whole way fits the calibration text better and held-out text worse (docs/log.md)
CORRECTION_STRENGTH = 0.5
BALANCE = True  # whether biases take back what rounding takes from mean outputs
# What is left of the relative error without means where they are left out. Short of this much the loudest tokens, of which others
# live, are better off with them (docs/log.md)
CENTRING_MUST_GAIN = 0.5


def _share(error: torch.Tensor, output: torch.Tensor) -> float:
    return float(error.square().sum() / output.square().sum().clamp_min(1e-30))


class GroupFit:
    """One group of linears on its way to being quantized: originals, empty modules and moments.

    Args:
        names: Names of the linears, for messages and the record.
        linears: The full-precision linears.
        source, targets: The empty quantized modules, on the device where the fit shall run.
        moments ([`Moments`]): Of the shared input.
        config ([`FreeActConfig`]): Settings.
        compensation ([`Compensation`], *optional*): Of the input.

    Raises:
        `ValueError`: if an input is not finite; the message names the module.
    """

    def __init__(
        self,
        names: list[str],
        linears: list[nn.Linear],
        source: FreeActInput,
        targets: list[FreeActLinear],
        moments: Moments,
        config: FreeActConfig,
        compensation: Compensation | None = None,
    ):
        if not moments.is_finite():
            raise ValueError(
                f"The inputs of {names[0]!r} hold NaN or inf in calibration: nothing can be fitted to them."
            )
        self.names, self.linears, self.source, self.targets = names, linears, source, targets
        self.moments, self.config = moments, config
        self.balanced = BALANCE
        self.relative_error = 0.0  # of the outputs on the sample rows, once filled
        own = type_rank_of(config, source.in_features)
        rank = 0 if source.basis is None else source.basis.shape[1] - config.n_types * own
        self.spec = map_spec(config, rank, own)
        self.original = torch.cat([linear.weight.detach().to(source.clip.device).double() for linear in linears])
        self.compensation = compensation
        self.weight = self.original if compensation is None else compensation.of_weight(self.original)
        parts = self.weight.split([linear.out_features for linear in linears])
        self.stats: InputStatistics = gather_statistics(moments, list(parts), self.spec)

    @torch.no_grad()
    def closed_form(self, generator: torch.Generator) -> InputRecord:
        """Fit the input's map, round the weights and fill the modules; `generator` draws the rotations (CPU).

        Where tokens inside a sequence may be loud, no mean is subtracted if outputs, each token's in relation to its own size, come
        out twice as close without: a mean that a loud part of a type decides may be more than all that the others are.
        """
        start = generator.get_state()
        record = self._fit_about_centres(generator)
        mean = self.stats.mean
        if mean is None or self.config.loudest is None or self.config.exclusive != "none":
            return record
        centred, error = self.stats, self.relative_error
        modules: list[FreeActInput | FreeActLinear] = [self.source, *self.targets]
        kept = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
        parts = self.weight.split([linear.out_features for linear in self.linears])
        self.stats = gather_statistics(self.moments, list(parts), dataclasses.replace(self.spec, centring="none"))
        self.stats.mean = torch.zeros_like(mean)
        self.balanced = False  # nor is a loud part's mean error anything to the others
        other = self._fit_about_centres(generator.set_state(start))
        if self.relative_error < CENTRING_MUST_GAIN * error:
            return other
        self.stats, self.relative_error, self.balanced = centred, error, BALANCE
        for module, state in zip(modules, kept, strict=True):
            for name, tensor in module.state_dict().items():
                tensor.copy_(state[name])
            module.forget()
        return record

    def _fit_about_centres(self, generator: torch.Generator) -> InputRecord:
        """[`closed_form`] about the centres that the statistics have."""
        found = fit_map(self.stats, self.spec, generator, self.config.n_types)
        sizes: list[int] = []
        if self.source.keep is not None:
            share = share_of(self.config.exclusive_share, self.names)
            keep = fixed_blocks([0 if name == SINK else share for name in self.config.token_types], len(self.stats.c))
            found.keep, sizes = keep, (~keep).sum(1).tolist()
        if self.config.exclusive == "closed_form":
            found.left_out, sizes = choose_exclusive(self.moments, found, self.weight, self.config)
            self.source.add_left_out(sum(sizes))
            if found.left_out is not None:
                whose = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
                found.leaves_out = torch.nn.functional.one_hot(whose, len(sizes)).mT.bool()
        self.source.store(found)
        return dataclasses.replace(self.fill(), exclusive=sizes)

    @torch.no_grad()
    def fill(self, clip: list[float] | None = None, weight_clip: torch.Tensor | None = None) -> InputRecord:
        """With the map in the module given: choose clips (or take the learned ones), round the weights, write all."""
        config, source = self.config, self.source
        stored = source.input_map(torch.float64)  # as stored, so that the layer is exact for what is stored
        v, low_rank = stored.transform_weight(self.weight)
        rows, types = self.moments.rows
        z, _ = stored.apply(rows.double(), types)
        pooled = config.pooled_types
        weights = loudness_of_types(rows, torch.tensor(pooled, device=types.device)[types], config.loudest)
        if clip is None:
            clip = search_clip(z, v, torch.tensor(pooled, device=types.device)[types], config, weights)
            clip = [clip[kind] for kind in pooled]
        source.clip.copy_(torch.tensor(clip))
        ratios = pick(source.clip.double().unsqueeze(-1), types)
        noise = fake_rows(z, config, ratios) - z
        if self.stats.parts is None:
            moments_z = stored.transform_moments(self.stats.c)
        else:
            moments_z = sum(stored.transform_moments(part, kind) for kind, part in self.stats.parts.items())
        eye = torch.eye(len(moments_z), dtype=moments_z.dtype, device=moments_z.device)
        moments_z = (moments_z + moments_z.mT) / 2
        variance = noise[types == 0].square().mean().nan_to_num()
        target = shrunk_weight(v, moments_z, variance) if is_shrunk(config, self.moments) else v
        if config.rounding_noise:  # of z itself: it reaches the weights too
            moments_z = moments_z + variance * eye
        if self.stats.paired is not None:
            corrected = self._corrected(stored, noise[types == 0], *self.stats.paired)
            target, low_rank = stored.transform_weight(corrected)
        self._write(target, round_weight(target, moments_z, config, weight_clip), low_rank, stored)
        used = torch.cat([module.transformed_weight(torch.float64) for module in self.targets])
        output = z @ v.mT
        lost = output - (z + noise) @ used.mT
        if self.stats.paired is None and self.balanced:
            lost = self._balance(lost, types, weights)
        if config.loudest is not None:  # what the choice of centres is made by
            self.relative_error = relative_error_of_tokens(lost, rows.double() @ self.weight.mT, types)
        energy = rows.double().square().sum()
        left = stored.centre(rows.double(), types).square().sum()
        return InputRecord(
            linears=list(self.names),
            clip=source.clip.tolist(),
            rank=0 if source.basis is None else source.basis.shape[1],
            mean_share=float(1 - left / energy.clamp_min(1e-30)),
            activation_error=_share(noise @ v.mT, output),
            weight_error=_share(z @ (used - v).mT, output),
        )

    def _corrected(
        self, stored: InputMap, noise: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor
    ) -> torch.Tensor:
        """The weight moved towards the full-precision outputs; the rounding noise of the input counts as noise of x."""
        eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        back = stored.transform_weight(eye)[0]  # x = z back^T
        ridge = self.config.damping * moments.diagonal().mean() * eye
        noisy = moments + noise.square().mean().nan_to_num() * back @ back.mT + ridge
        return corrected_weight(self.weight, noisy, cross + ridge, CORRECTION_STRENGTH)

    def _balance(self, lost: torch.Tensor, types: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add to each type's output bias what rounding takes from its mean output, measured on the sample rows; returns what the
        rows still lose.
        """
        means = self.targets[0].bias_rows()
        if means is None or self.config.centring == "none":
            return lost
        left = lost.clone()
        biases = [rows.double() for module in self.targets if (rows := module.bias_rows()) is not None]
        pooled = torch.tensor(self.config.pooled_types, device=types.device)
        for kind in range(len(means)):
            rows = (
                pooled[types] == pooled[kind]
            )  # a shared bias follows type 0: the sink's error would outweigh all others'
            if int(rows.sum()) < MIN_ROWS_PER_TYPE:
                continue
            weight = weights[rows]
            mean = weight / weight.sum() @ lost[rows]
            left[types == kind if len(means) > 1 else slice(None)] -= mean  # a shared bias is everybody's
            parts = mean.split([module.out_features for module in self.targets])
            for bias, part in zip(biases, parts, strict=True):
                bias[kind] += part
        for module, bias in zip(self.targets, biases, strict=True):
            module.set_bias_rows(bias)
        return left

    def _write(
        self, target: torch.Tensor, rounded: RoundedWeight | None, low_rank: torch.Tensor | None, stored: InputMap
    ) -> None:
        """Fill the group's linears with their rows of the stacked weight."""
        start = 0
        for module, linear in zip(self.targets, self.linears, strict=True):
            rows = slice(start, start + module.out_features)
            if rounded is None:
                module.set_weight(target[rows].unsqueeze(1), None)
            else:
                module.set_weight(*(None if part is None else part[rows] for part in rounded))
            bias = None if linear.bias is None else linear.bias.detach().to(target.device)
            bias = output_biases(self.moments, stored, self.original[rows], bias, self.compensation)
            if bias is not None:
                module.set_bias_rows(bias)
            if low_rank is not None:
                module.set_low_rank(low_rank[rows])
            start = rows.stop
