"""The calibration loop: one block at a time, only that block and its inputs at work.

For each block: run it on the inputs that the quantized blocks before it produce (and, where errors are corrected, on
the full-precision ones), stream the moments of each shared input, fit, replace the linears, and run the quantized block
to get the next block's inputs. Blocks that a previous, interrupted run finished are read back instead of fitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from optimum_freeact.calibration.block_fit import BlockFit, note_exclusive
from optimum_freeact.calibration.capture import Batch, capture, run_block
from optimum_freeact.calibration.checks import block_experts
from optimum_freeact.calibration.ranks import Ranks
from optimum_freeact.calibration.records import BlockRecord, InputRecord
from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.calibration.stream import Stream
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import SharedInputs, block_linears, find_blocks, table_groups
from optimum_freeact.modules.surgery import input_name, replace_experts, replace_group
from optimum_freeact.type_state import TypeState


logger = logging.getLogger(__name__)
Names = TypeVar("Names")  # names of linears or of experts, in lists


def calibrate(
    model: nn.Module, config: FreeActConfig, samples: torch.Tensor | list[dict], state: TypeState, device: torch.device
) -> Iterator[BlockRecord]:
    """Quantize the linears of a loaded full-precision model in place, yielding a record per finished block.

    Args:
        model: A transformers decoder in full precision.
        config ([`FreeActConfig`]): Settings; `input_groups` is filled in.
        samples (`torch.Tensor` of shape `(n, length)`, or `list[dict]`): Token ids, or prepared inputs.
        state ([`TypeState`]): Already fed by the model's typing hook.
        device (`torch.device`): Where blocks are calibrated; each returns to its own device afterwards.
    """
    prefix, blocks = find_blocks(model)
    ranks = Ranks(config)
    samples_here = ranks.share(samples)
    batches = capture(model, blocks, samples_here, config.batch_size, state)
    warn_absent(batches, config.token_types)
    stream = Stream(batches, config, device, state)
    store = BlockStore(config, samples, model) if config.resume_dir else None
    config.input_groups, experts = {}, {}
    bar = tqdm(blocks, desc=f"Calibrating {config.scheme}", unit="block", disable=not config.progress)
    for index, block in enumerate(bar):
        start = time.perf_counter()
        home = next(block.parameters()).device
        block.to(device)
        linears = block_linears(block, f"{prefix}.{index}", config.modules_to_not_convert)
        groups = block_groups(model, block, linears, stream, index)
        config.input_groups[str(index)] = groups
        experts[str(index)] = list(block_experts(block, f"{prefix}.{index}", config.modules_to_not_convert))
        if experts[str(index)] and ranks.size > 1:
            raise ValueError(
                "across_processes=True does not share the fit of experts yet; leave it out for this model."
            )
        found = _quantize_block(block, f"{prefix}.{index}", index, linears, groups, stream, config, store, ranks)
        block.to(home)
        record = BlockRecord(index, time.perf_counter() - start, *found)
        bar.set_postfix(output_error=f"{record.output_error:.4f}")
        yield record
    config.input_groups = compress_groups(config.input_groups)
    config.experts = compress_groups(experts) if any(experts.values()) else None


def _quantize_block(block, name, index, linears, groups, stream, config, store, ranks):
    """Fit or read back one block; returns its output error, its inputs' records and the learned stage's record."""
    done = store.load(index) if store else None
    records: list[InputRecord] = []
    learned = None
    if done is None:
        reference, records, learned = BlockFit(block, name, index, linears, groups, stream, config, ranks).run()
    else:
        reference = stream.observe(block, index, {}, {})
        replace_block(block, name, index, groups, config, stream, done)
        store.restore(index, block, done)
    for module in block.modules():
        if hasattr(module, "prepare"):
            module.prepare()
    error = ranks.mean(stream.advance(block, index, reference))
    if store and done is None and ranks.is_main:
        store.save(index, block)
    return error, records, learned


def replace_block(block, name, index, groups, config, stream, stored):
    """Quantized modules in the place of a block's own, empty, for the tensors `stored` of an earlier run."""
    for group in groups:
        n_left_out = stored.get(f"{input_name(group)}.left_out", torch.empty(0, 0)).shape[1]
        source, _ = replace_group(block, group, config, stream.state, stream.device, n_left_out)
        note_exclusive(config, index, group, source)
    for inner in block_experts(block, name, config.modules_to_not_convert):
        replace_experts(block, inner, config, stream.state, stream.device)


def warn_absent(batches: list[Batch], names: list[str]) -> None:
    """Say which types no calibration token is of: their statistics are those of all tokens."""
    seen = {int(kind) for batch in batches if batch.types is not None for kind in batch.types.unique()}
    absent = [name for kind, name in enumerate(names) if seen and kind not in seen]
    if absent:
        logger.warning(
            "No calibration token is of type %s: the statistics of all tokens are used for it. Calibrate on data that has "
            "such tokens.",
            absent,
        )


@torch.no_grad()
def block_groups(
    model: nn.Module, block: nn.Module, linears: dict[str, nn.Linear], stream: Stream, index: int
) -> list[list[str]]:
    """Which linears share an input: from the table, else by watching the block run on one batch."""
    known = table_groups(model.config.model_type, linears)
    if known is not None:
        return known
    watcher = SharedInputs(linears)
    batch = stream.batches[0]
    stream.state.types = None if batch.types is None else batch.types.to(stream.device)
    try:
        run_block(block, stream.actual[0], batch.calls[index], stream.device)
    except BaseException:
        watcher.end()
        raise
    groups = watcher.groups()
    unused = set(linears) - {name for group in groups for name in group}
    if unused:
        logger.warning(
            "Linears %s of block %d did not run in calibration, or the model reads their weights itself: they stay as they "
            "are.",
            sorted(unused),
            index,
        )
    return groups


def compress_groups(groups: dict[str, list[Names]]) -> dict[str, list[Names]]:
    """One entry `"*"` where all blocks have the same groups, which is the rule."""
    distinct = {str(value) for value in groups.values()}
    return {"*": next(iter(groups.values()))} if len(distinct) == 1 else groups
