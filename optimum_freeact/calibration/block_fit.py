"""The fit of one block: moments of what its linears read, the closed form of each group, experts, then the learned stage."""

from __future__ import annotations

import torch
from torch import nn

from optimum_freeact.calibration.checks import block_experts, check_moments
from optimum_freeact.calibration.closed_form import GroupFit
from optimum_freeact.calibration.experts import fit_experts, routed_tokens
from optimum_freeact.calibration.ranks import Ranks
from optimum_freeact.calibration.records import InputRecord
from optimum_freeact.calibration.refinement import refine_block
from optimum_freeact.calibration.stream import Stream, exact_activations
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import is_compensated, replace_experts, replace_group
from optimum_freeact.moments import Moments
from optimum_freeact.transforms.compensation import Compensation, fit_compensation


class BlockFit:
    """A block on its way from full precision to quantized.

    What a group reads is measured in one run of the full-precision block, but for groups whose input depends on the linears before
    them: those are measured when these are quantized (errors are corrected, `sequential`, or attention's output is compensated).

    Args:
        block: On the stream's device; changed in place.
        name (`str`): In the model.
        index (`int`): Which block it is.
        linears (`dict[str, nn.Linear]`): By their names in the block.
        groups (`list[list[str]]`): Linears that read one input, in the order in which they run.
        stream ([`Stream`]): The inputs of this block.
        config ([`FreeActConfig`]): Settings; `exclusive_sizes` is filled in.
        ranks ([`Ranks`]): Processes that share the work.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        index: int,
        linears: dict[str, nn.Linear],
        groups: list[list[str]],
        stream: Stream,
        config: FreeActConfig,
        ranks: Ranks,
    ):
        self.block, self.name, self.index, self.linears, self.groups = block, name, index, linears, groups
        self.stream, self.config, self.ranks = stream, config, ranks
        self.experts = block_experts(block, name, config.modules_to_not_convert)
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        self.peaks = config.channel_scale == "smoothquant"
        self.compensated = [group[0] for group in groups if is_compensated(config, group)]
        self.later = {group[0] for group in groups[1:]} if stream.paired or config.sequential else set()
        self.moments: dict[str, Moments] = {}
        self.fits: dict[str, GroupFit | None] = {}

    def run(self) -> tuple[list[torch.Tensor], list[InputRecord], dict | None]:
        """Quantize the block; returns the full-precision outputs of each batch and the records of inputs and of learning."""
        reference = self._observe()
        exact = {first: self._measured(first) for first in self.compensated}
        routed = {} if self.config.sequential else {inner: self._routed(inner) for inner in self.experts}
        records = self._fit_groups(exact)
        for inner in self.experts:
            records += self._fit_experts(inner, routed)
        if self.config.calibration != "learned":
            return reference, records, None
        return reference, *refine_block(
            self.block, self.groups, self.linears, self.fits, records, self.stream, self.index, reference, self.config
        )

    def _observe(self) -> list[torch.Tensor]:
        """Run the block as it is, with the moments of all that can be measured so."""
        firsts = [group[0] for group in self.groups]
        settings = {"paired": self.stream.paired, "peaks": self.peaks, "limit": self.config.loudest}
        self.moments = {
            first: Moments(self.linears[first].in_features, self.config.n_types, self.stream.device, **settings)
            for first in firsts
            if first not in self.later and first not in self.compensated
        }
        reference = self.stream.observe(
            self.block, self.index, {first: self.linears[first] for first in firsts}, self.moments
        )
        for seen in self.moments.values():
            self.ranks.reduce(seen)
        return reference

    def _measured(self, first: str, *more) -> Moments:
        """Moments of what a linear reads in the block as it is now."""
        return self.stream.input_moments(
            self.block, self.index, self.linears[first], self.config.n_types, self.ranks, *more
        )

    def _measure_later(self, first: str, exact: dict[str, Moments]) -> Compensation | None:
        """Moments that had to wait for the linears before, now that these are quantized; `exact` are of full precision."""
        if first in exact:
            self.moments[first] = self._measured(first)
            return fit_compensation(self.moments[first], exact.pop(first))
        if first in self.later and self.config.sequential:
            with exact_activations(self.block):
                self.moments[first] = self._measured(first, self.peaks)
        elif first in self.later:
            self.moments[first] = self._measured(first, self.peaks, self.stream.exact_rows.pop(first))
        return None

    def _fit_groups(self, exact: dict[str, Moments]) -> list[InputRecord]:
        """Replace and fit the groups in their order, each by its owner among the processes."""
        owners = self.ranks.owners(self.groups, self.linears)
        replaced: list[list[nn.Module]] = []
        records: list[InputRecord | None] = []
        for group, owner in zip(self.groups, owners, strict=True):
            originals = [self.linears[name] for name in group]
            compensation = self._measure_later(group[0], exact)
            check_moments(self.moments[group[0]], f"{self.name}.{group[0]}")
            source, targets = replace_group(self.block, group, self.config, self.stream.state, self.stream.device)
            replaced.append([source, *targets])
            if owner != self.ranks.rank:
                self.ranks.skip(self.generator, source.in_features)
                del self.moments[group[0]]
                records.append(None)
            else:
                seen = self.moments.pop(group[0])
                fit = GroupFit(group, originals, source, targets, seen, self.config, compensation)
                del seen  # as large as the square of the input: nothing keeps it longer than the fit
                records.append(fit.closed_form(self.generator))
                self.fits[group[0]] = fit if self.config.calibration == "learned" else None
            note_exclusive(self.config, self.index, group, source)
        for modules, owner in zip(replaced, owners, strict=True):
            self.ranks.spread(modules, owner if len(set(owners)) > 1 else 0)
        return self.ranks.merge_records(records)

    def _routed(self, inner: str):
        """The tokens that each expert of a module gets."""
        return routed_tokens(self.stream, self.block, self.index, self.experts[inner])

    def _fit_experts(self, inner: str, routed: dict) -> list[InputRecord]:
        """Replace and fit the experts of one module; their tokens are measured now if `routed` has none."""
        if inner not in routed:
            with exact_activations(self.block):
                routed[inner] = self._routed(inner)

        def make() -> nn.Module:
            return replace_experts(self.block, inner, self.config, self.stream.state, self.stream.device)

        return fit_experts(self.block, inner, make, routed.pop(inner), self.config, self.generator, self.name)


def note_exclusive(config: FreeActConfig, index: int, group: list[str], source: nn.Module) -> None:
    """Fill in how many directions each type of a group leaves out, if any."""
    if source.left_out is not None:
        found = {f"{index}.{group[0]}": source.left_out.shape[1]}
        config.exclusive_sizes = {**(config.exclusive_sizes or {}), **found}
