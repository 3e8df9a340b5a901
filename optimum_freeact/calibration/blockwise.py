"""The calibration loop: one block at a time, only that block and its inputs at work.

For each block: run it on the inputs that the quantized blocks before it produce (and, where errors are corrected, on
the full-precision ones), stream the moments of each shared input, fit, replace the linears, and run the quantized block
to get the next block's inputs. Blocks that a previous, interrupted run finished are read back instead of fitted.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from optimum_freeact.calibration.capture import Batch, capture, run_block
from optimum_freeact.calibration.checks import block_experts
from optimum_freeact.calibration.closed_form import GroupFit
from optimum_freeact.calibration.experts import fit_experts, routed_tokens
from optimum_freeact.calibration.learned import Target, build_twins, learn, map_parameters, write_back
from optimum_freeact.calibration.ranks import Ranks
from optimum_freeact.calibration.records import BlockRecord, InputRecord
from optimum_freeact.calibration.resume import BlockStore
from optimum_freeact.calibration.stream import Stream, exact_activations
from optimum_freeact.calibration.tuned import TunedLinear
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import SharedInputs, block_linears, find_blocks, table_groups
from optimum_freeact.modules.surgery import (
    input_name,
    is_compensated,
    replace_experts,
    replace_group,
)
from optimum_freeact.moments import Moments
from optimum_freeact.transforms.compensation import fit_compensation
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
        record = _quantize_block(
            block, f"{prefix}.{index}", linears, groups, index, stream, config, store, device, ranks
        )
        block.to(home)
        record = BlockRecord(index, time.perf_counter() - start, record[0], record[1], record[2])
        bar.set_postfix(output_error=f"{record.output_error:.4f}")
        yield record
    config.input_groups = compress_groups(config.input_groups)
    config.experts = compress_groups(experts) if any(experts.values()) else None


def _quantize_block(block, name, linears, groups, index, stream, config, store, device, ranks):
    """Fit or read back one block; returns its output error, its inputs' records and the learned stage's record."""
    n_types = config.n_types
    experts = block_experts(block, name, config.modules_to_not_convert)
    done = store.load(index) if store else None
    records: list[InputRecord | None] = []
    learned, fits = None, {}
    compensated = [group[0] for group in groups if done is None and is_compensated(config, group)]
    later = {group[0] for group in groups[1:]} if stream.paired or config.sequential else set()
    if done is None:
        wanted = {"paired": stream.paired, "peaks": config.channel_scale == "smoothquant", "limit": config.loudest}
        moments = {  # but of what is measured when the linears before it are finished
            group[0]: Moments(linears[group[0]].in_features, n_types, device, **wanted)
            for group in groups
            if group[0] not in later and group[0] not in compensated
        }
        reference = stream.observe(block, index, {group[0]: linears[group[0]] for group in groups}, moments)
        for seen in moments.values():
            ranks.reduce(seen)
    else:
        reference = stream.observe(block, index, {}, {})
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    exact = {first: stream.input_moments(block, index, linears[first], n_types, ranks) for first in compensated}
    routed = {}
    if done is None and not config.sequential:
        routed = {inner: routed_tokens(stream, block, index, module) for inner, module in experts.items()}
    owners = ranks.owners(groups, linears)
    replaced: list[list[nn.Module]] = []
    for group, owner in zip(groups, owners):
        originals, compensation = [linears[name] for name in group], None
        if group[0] in exact:  # what it reads, now that the linears before it are quantized
            moments[group[0]] = stream.input_moments(block, index, linears[group[0]], n_types, ranks)
            compensation = fit_compensation(moments[group[0]], exact.pop(group[0]))
        elif done is None and group[0] in later and config.sequential:
            with exact_activations(block):
                moments[group[0]] = stream.input_moments(
                    block, index, linears[group[0]], n_types, ranks, wanted["peaks"]
                )
        elif done is None and group[0] in later:
            exact_rows = stream.exact_rows.pop(group[0])
            moments[group[0]] = stream.input_moments(
                block, index, linears[group[0]], n_types, ranks, wanted["peaks"], exact_rows
            )
        if done is None:
            check_finite(moments[group[0]], f"{name}.{group[0]}")
        stored = {} if done is None else done
        n_left_out = stored.get(f"{input_name(group)}.left_out", torch.empty(0, 0)).shape[1]
        source, targets = replace_group(block, group, config, stream.state, device, n_left_out)
        replaced.append([source, *targets])
        if done is None and owner != ranks.rank:
            ranks.skip(generator, source.in_features)
            del moments[group[0]]
            records.append(None)
        elif done is None:
            fit = GroupFit(group, originals, source, targets, moments.pop(group[0]), config, compensation)
            records.append(fit.closed_form(generator))
            fits[group[0]] = fit if config.calibration == "learned" else None
        if source.left_out is not None:
            config.exclusive_sizes = {
                **(config.exclusive_sizes or {}),
                f"{index}.{group[0]}": source.left_out.shape[1],
            }
    if done is None:
        for modules, owner in zip(replaced, owners):
            ranks.spread(modules, owner if len(set(owners)) > 1 else 0)
        records = ranks.merge_records(records)
    for inner, module in experts.items():
        if done is not None:
            replace_experts(block, inner, config, stream.state, device)
            continue
        if inner not in routed:
            with exact_activations(block):
                routed[inner] = routed_tokens(stream, block, index, module)

        def make(inner: str = inner) -> nn.Module:
            return replace_experts(block, inner, config, stream.state, device)

        records += fit_experts(block, inner, make, routed.pop(inner), config, generator, name)
    if done is not None:
        store.restore(index, block, done)
    elif config.calibration == "learned":
        records, learned = refine_block(block, groups, linears, fits, records, stream, index, reference, config)
    for module in block.modules():
        if hasattr(module, "prepare"):
            module.prepare()
    error = ranks.mean(stream.advance(block, index, reference))
    if store and done is None and ranks.is_main:
        store.save(index, block)
    return error, records, learned


def check_finite(moments: Moments, name: str) -> None:
    """Raise a `ValueError` that names the linear if its inputs are not finite."""
    if not moments.is_finite():
        raise ValueError(
            f"The input of '{name}' holds NaN or inf in calibration: nothing can be fitted to it. Check "
            "the model in full precision on the same data, or load it in bfloat16 or float32 instead of float16."
        )


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


def refine_block(block, groups, linears, fits, records, stream, index, reference, config):
    """Learn a block from its closed form; keep what is learned only where the held-out batch's error falls.

    From a random start there is no such choice: that is the published method, and it is kept in any case.
    """
    targets = [Target(output, batch.types) for output, batch in zip(reference, stream.batches, strict=True)]

    def error() -> float:
        with torch.no_grad():
            return float(targets[-1].loss(stream.run(block, index, len(targets) - 1)))

    stream.stage(index)
    before = error()
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    run = functools.partial(stream.run, block, index)
    if config.learned_part == "outputs":
        tuned = {name: TunedLinear(block.get_submodule(name)) for group in groups for name in group}
        parameters = [
            {"params": [p for twin in tuned.values() for p in twin.parameters()], "lr": config.learning_rate}
        ]
        result, learned = learn(block, tuned, parameters, lambda: None, run, targets, config), records
        for twin in tuned.values():
            twin.write_back()
    else:
        twins, inputs = build_twins(block, groups, linears, config)
        parameters = map_parameters(twins, inputs, config.learning_rate)

        def forget() -> None:
            for each in inputs:
                each.forget()

        result = learn(block, twins, parameters, forget, run, targets, config)
        learned = []
        for group, twin in zip(groups, inputs, strict=True):
            clip = write_back(fits[group[0]].source, twin)
            weight_clip = torch.cat([torch.sigmoid(twins[name].clip.detach()) for name in group])
            learned.append(fits[group[0]].fill(clip, weight_clip))
    after = error()
    accepted = config.learned_start == "random" or after < before
    if not accepted:
        block.load_state_dict(kept)
    summary = {**result, "held_out_before": before, "held_out_after": after, "accepted": accepted}
    return learned if accepted else records, summary


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
