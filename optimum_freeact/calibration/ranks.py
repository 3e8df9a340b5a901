"""Several processes, one GPU each, that calibrate one model together (`accelerate launch`, `torchrun`).

Each takes its share of the samples through the block; the moments are summed over all; each fits some of the block's
groups and hands the quantized modules to the others. So every process ends with the same model, and only what a block
needs ever travels. Without processes to share with, everything here does nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import is_plain_linear
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair


class Ranks:
    """The processes of a calibration.

    Args:
        config ([`FreeActConfig`]): `across_processes` says whether the work is shared.

    Raises:
        `ValueError`: if it shall be shared but was not started as several processes, or learns by gradient steps.
    """

    def __init__(self, config: FreeActConfig):
        self.rank, self.size, self.device = 0, 1, None
        if not config.across_processes:
            return
        if config.calibration == "learned":
            raise ValueError(
                "across_processes=True shares the closed form among processes; calibration='learned' runs in one. Leave "
                "one of the two out."
            )
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.size, self.device = state.process_index, state.num_processes, state.device
        if self.size == 1:
            raise ValueError(
                "across_processes=True needs several processes and found one: start the program with `accelerate launch "
                "--num_processes N`, or leave it out."
            )
        # what changes a block between the fits of two groups is not split: each process fits all
        simple = config.exclusive == "none" and not config.attention_compensation
        self.splits_fits = simple and config.transform in ("hadamard", "kronecker")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, samples: torch.Tensor | list) -> torch.Tensor | list:
        """This process's samples.

        Raises:
            `ValueError`: if there are fewer samples than processes.
        """
        if self.size == 1:
            return samples
        if len(samples) < self.size:
            raise ValueError(f"{len(samples)} samples cannot be shared by {self.size} processes; raise n_samples.")
        return samples[self.rank :: self.size]

    def reduce(self, moments: Moments) -> None:
        """Replace this process's moments by those of all samples, the same in all processes."""
        if self.size == 1:
            return
        own = moments.weight.clone()
        dist.all_reduce(moments.count)
        dist.all_reduce(moments.weight)
        shift = moments.shift * own[:, None]
        dist.all_reduce(shift)
        shift = (shift / moments.weight.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).float().double()
        change = moments.shift - shift  # x - shift = (x - own shift) + change
        for kind in range(moments.n_types):
            move, n = change[kind], own[kind]
            self._move(moments.second[kind], moments.sum[kind], moments.sum[kind], move, n)
            if moments.paired:
                sum_y, cross = moments.pair_sums
                self._move(cross[kind], sum_y[kind], moments.sum[kind], move, n)
        moments.shift = shift
        for sums in (moments.sum, moments.pair_sums[0]) if moments.paired else (moments.sum,):
            sums += own[:, None] * change
            dist.all_reduce(sums)
        if moments.peak is not None:
            dist.all_reduce(moments.peak, dist.ReduceOp.MAX)
        rows, types = moments.rows
        moments._rows, moments._row_types = [self._gather(rows[:: self.size])], [self._gather(types[:: self.size])]

    @staticmethod
    def _move(product: torch.Tensor, left: torch.Tensor, right: torch.Tensor, move: torch.Tensor, n: torch.Tensor):
        """Second moments about another centre, summed over the processes, in place."""
        product.addr_(left, move).addr_(move, right + n * move)
        dist.all_reduce(product)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(size) for size in sizes]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes)])

    def owners(self, groups: list[list[str]], linears: dict[str, nn.Linear]) -> list[int]:
        """Which process fits each group: the dearest first, each to the one with least to do."""
        if self.size == 1 or not self.splits_fits:
            return [self.rank] * len(groups)
        costs = []
        for group in groups:
            d, m = linears[group[0]].in_features, sum(linears[name].out_features for name in group)
            costs.append(float(d) * d * (d + m))
        load, found = [0.0] * self.size, [0] * len(groups)
        for index in sorted(range(len(groups)), key=lambda i: -costs[i]):
            found[index] = load.index(min(load))
            load[found[index]] += costs[index]
        return found

    def skip(self, generator: torch.Generator, in_features: int) -> None:
        """Draw what the fit of a group draws, so that the next one draws as it would in one process."""
        for n in factor_pair(in_features):
            flat_rotation(n, generator)

    def spread(self, modules: list[nn.Module], owner: int) -> None:
        """Copy the tensors of the owner's modules to all processes."""
        if self.size == 1:
            return
        for module in modules:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                values = tensor.data.contiguous()
                dist.broadcast(values.view(torch.uint8) if values.dtype == torch.bool else values, owner)
                tensor.data.copy_(values)

    def merge_records(self, records: list) -> list:
        """Records of all groups in order, from those that each process fitted (`None` for the others)."""
        if self.size == 1:
            return records
        found: list = [None] * self.size
        dist.all_gather_object(found, records)
        return [next(entry for entry in entries if entry is not None) for entries in zip(*found)]

    def mean(self, value: float) -> float:
        """Mean of a number over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64).to(self.device)
        dist.all_reduce(total)
        return float(total) / self.size


def block_bytes(
    block: nn.Module, n_types: int, tokens: int, hidden_size: int, element_size: int = 2
) -> dict[str, int]:
    """An upper bound of the bytes that calibrating one block takes on its device, by part (docs/performance.md).

    Args:
        block: In full precision.
        n_types (`int`): Token types, each with moments of its own.
        tokens (`int`): Calibration tokens of this process.
        hidden_size (`int`), element_size (`int`): Of the hidden states that go from block to block.

    Returns:
        `dict[str, int]`: `weights` (full precision and quantized), `hidden` (inputs and outputs of all samples), `moments`
        (second moments of every input, float64), `fit` (the widest input's matrices while it is fitted: twelve of
        d x d and five of the stacked weight, float64) and their `total`.
    """
    linears = [module for module in block.modules() if is_plain_linear(module)]
    widths: dict[int, int] = {}
    for linear in linears:
        widths[linear.in_features] = max(widths.get(linear.in_features, 0), linear.out_features)
    found = {
        "weights": 2 * sum(parameter.nbytes for parameter in block.parameters()),
        "hidden": 2 * tokens * hidden_size * element_size,
        "moments": 8 * n_types * sum(linear.in_features**2 for linear in linears),
        "fit": 8 * max(12 * d * d + 15 * d * m for d, m in widths.items()),
    }
    return found | {"total": sum(found.values())}
