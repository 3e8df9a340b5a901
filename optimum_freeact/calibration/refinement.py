"""The learned stage of a block: from its closed form, kept where a held-out batch says so."""

from __future__ import annotations

import functools

import torch

from optimum_freeact.calibration.learned import Target, build_twins, learn, map_parameters, write_back
from optimum_freeact.calibration.tuned import TunedLinear


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
        result, learned = _learn_outputs(block, groups, run, targets, config), records
    else:
        result, learned = _learn_maps(block, groups, linears, fits, run, targets, config)
    after = error()
    accepted = config.learned_start == "random" or after < before
    if not accepted:
        block.load_state_dict(kept)
    summary = {**result, "held_out_before": before, "held_out_after": after, "accepted": accepted}
    return learned if accepted else records, summary


def _learn_outputs(block, groups, run, targets, config) -> dict:
    """Learn what a product's outputs are scaled and shifted by; the codes stay."""
    tuned = {name: TunedLinear(block.get_submodule(name)) for group in groups for name in group}
    parameters = [{"params": [p for twin in tuned.values() for p in twin.parameters()], "lr": config.learning_rate}]
    result = learn(block, tuned, parameters, lambda: None, run, targets, config)
    for twin in tuned.values():
        twin.write_back()
    return result


def _learn_maps(block, groups, linears, fits, run, targets, config) -> tuple[dict, list]:
    """Learn the maps and clips, then round the weights anew; returns what the steps did and the inputs' records."""
    twins, inputs = build_twins(block, groups, linears, config)

    def forget() -> None:
        for each in inputs:
            each.forget()

    parameters = map_parameters(twins, inputs, config.learning_rate)
    result = learn(block, twins, parameters, forget, run, targets, config)
    learned = []
    for group, twin in zip(groups, inputs, strict=True):
        clip = write_back(fits[group[0]].source, twin)
        weight_clip = torch.cat([torch.sigmoid(twins[name].clip.detach()) for name in group])
        learned.append(fits[group[0]].fill(clip, weight_clip))
    return result, learned
