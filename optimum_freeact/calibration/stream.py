"""The calibration batches on their way through the blocks, and the moments of what each linear reads from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from optimum_freeact.calibration.capture import Batch, run_block, to_device
from optimum_freeact.calibration.ranks import Ranks
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.metrics import relative_error_of_types
from optimum_freeact.type_state import TypeState


NO_TYPE = -1  # of padding


class Stream:
    """The batches' hidden states in the quantized model and, where needed, in the full-precision one."""

    def __init__(self, batches: list[Batch], config: FreeActConfig, device: torch.device, state: TypeState):
        self.batches, self.device, self.state = batches, device, state
        self.propagate = config.propagate_error
        self.sequential = config.sequential
        self.paired = config.error_correction and config.propagate_error
        self.loudest = config.loudest
        self.keep_outputs = config.calibration == "learned"
        self.actual = [batch.hidden for batch in batches]
        self.exact = list(self.actual) if self.paired else None
        self.exact_rows: dict[str, list[torch.Tensor]] = {}  # of the present block's inputs

    def _types(self, batch: Batch, like: torch.Tensor) -> torch.Tensor:
        types = batch.types
        types = torch.zeros(like.shape[:-1], dtype=torch.long) if types is None else types
        if batch.padding is not None and batch.padding.numel() == types.numel():
            types = types.reshape(-1).masked_fill(batch.padding.reshape(-1).to(types.device), NO_TYPE)
        return types.to(self.device).flatten()

    @torch.no_grad()
    def observe(self, block: nn.Module, index: int, inputs: dict[str, nn.Linear], moments: dict[str, Moments]):
        """Run the full-precision block on all batches and stream the moments of the linears that `moments` names.

        Returns the last batch's output, against which the quantized block is measured, and the outputs that become
        the next full-precision inputs.
        """
        seen = _Seen()
        hooks = [linear.register_forward_pre_hook(_keep(seen, name)) for name, linear in inputs.items()]
        outputs = []
        self.exact_rows = {name: [] for name in list(inputs)[1:]}  # the first is fitted before anything has changed
        for i, batch in enumerate(self.batches):
            self.state.types = None if batch.types is None else batch.types.to(self.device)
            if self.exact is not None:
                self.exact[i] = run_block(block, self.exact[i], batch.calls[index], self.device)
                paired = dict(seen)
                for name, kept in self.exact_rows.items():
                    if name in seen:
                        kept.append(seen[name])
                seen.clear()
            else:
                paired = {}
            last = i == len(self.batches) - 1
            needed = last or not self.propagate or self.keep_outputs
            if moments or needed:
                output = self._run_observed(block, index, i, seen, None if needed else set(moments))
                for name in (name for name in seen if name in moments):
                    x, y = seen[name], paired.get(name)
                    types = self._types(batch, x) if x.shape[:-1].numel() == batch.hidden.shape[:-1].numel() else None
                    types = (
                        torch.zeros(x.shape[:-1].numel(), dtype=torch.long, device=x.device)
                        if types is None
                        else types
                    )
                    rows, y = x.flatten(0, -2), None if y is None else y.flatten(0, -2)
                    if batch.padding is not None:
                        real = types != NO_TYPE
                        rows, y, types = rows[real], None if y is None else y[real], types[real]
                    moments[name].update(rows, types, y)
                seen.clear()
                outputs.append(output if needed else None)
        for hook in hooks:
            hook.remove()
        return outputs

    def _run_observed(self, block: nn.Module, index: int, i: int, seen: _Seen, enough: set[str] | None):
        """Output of the block on batch `i`; with `enough`, it stops (and gives `None`) once these inputs are seen."""
        seen.enough = enough
        try:
            return run_block(block, self.actual[i], self.batches[i].calls[index], self.device)
        except _AllSeen:
            return None
        finally:
            seen.enough = None

    def stage(self, index: int) -> None:
        """Bring what block `index` is called with to the device, so that [`run`] copies nothing."""
        for i, batch in enumerate(self.batches):
            self.actual[i] = self.actual[i].to(self.device)
            batch.types = None if batch.types is None else batch.types.to(self.device)
            batch.calls[index] = to_device(batch.calls[index], self.device)

    def run(self, block: nn.Module, index: int, i: int) -> torch.Tensor:
        """Output of the block on batch `i` as the quantized model feeds it."""
        batch = self.batches[i]
        self.state.types = None if batch.types is None else batch.types.to(self.device)
        return run_block(block, self.actual[i], batch.calls[index], self.device)

    @torch.no_grad()
    def input_moments(
        self,
        block: nn.Module,
        index: int,
        linear: nn.Linear,
        n_types: int,
        ranks: Ranks,
        peaks: bool = False,
        exact: list[torch.Tensor] | None = None,
    ) -> Moments:
        """Moments of what a linear reads in the block as it is now, paired with full-precision rows of each batch if given."""
        seen = _Seen()
        found = Moments(
            linear.in_features, n_types, self.device, peaks=peaks, paired=exact is not None, limit=self.loudest
        )
        hook = linear.register_forward_pre_hook(_keep(seen, "input"))
        for i, batch in enumerate(self.batches):
            self.state.types = None if batch.types is None else batch.types.to(self.device)
            self._run_observed(block, index, i, seen, {"input"})  # what comes behind the input is not needed
            x, types = seen["input"].flatten(0, -2), self._types(batch, seen["input"])
            real = types != NO_TYPE
            y = None if exact is None else exact[i].flatten(0, -2)[real]
            found.update(x[real], types[real], y)
            seen.clear()
        hook.remove()
        ranks.reduce(found)
        return found

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, reference: list[torch.Tensor]) -> float:
        """Run the quantized block to get the next inputs; returns the relative error on the last batch, type by type."""
        with ExitStack() as stack:
            for module in block.modules():
                if isinstance(module, FreeActLinear) and module.weight_group_scale is not None:
                    stack.enter_context(module.values_at_hand())
            return self._advance(block, index, reference)

    def _advance(self, block: nn.Module, index: int, reference: list[torch.Tensor]) -> float:
        error = 0.0
        for i in range(len(self.batches)):
            last = i == len(self.batches) - 1
            if self.propagate or last:
                output = self.run(block, index, i)
                if last:
                    error = relative_error_of_types(output, reference[-1], self.batches[i].types)
            if self.sequential:
                with exact_activations(block):
                    output = self.run(block, index, i)
            self.actual[i] = output if self.propagate else reference[i]
        return error


@contextmanager
def exact_activations(block: nn.Module) -> Iterator[None]:
    """Quantized linears of a block read their inputs unrounded; the weights stay quantized."""
    sides = [module for module in block.modules() if isinstance(module, FreeActInput)]
    kept = [(side.bits, side._tables, side._native) for side in sides]
    for side in sides:
        side.bits, side._tables, side._native = 16, None, None
    try:
        yield
    finally:
        for side, (bits, tables, native) in zip(sides, kept, strict=True):
            side.bits, side._tables, side._native = bits, tables, native


class _AllSeen(Exception):  # noqa: N818
    """Raised in a block when all inputs that are asked for are known: what comes behind them is not needed."""


class _Seen(dict):
    """Inputs by name; those in `enough` end the block's run early when all are there."""

    enough: set[str] | None = None


def _keep(seen: _Seen, name: str):
    def hook(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
        seen[name] = args[0]
        if seen.enough is not None and seen.enough <= seen.keys():
            raise _AllSeen

    return hook
