"""How loud single tokens are beside the others of their type: why a mean of the type may be the mean of a few."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimum_freeact.calibration.masking import mask_samples
from optimum_freeact.calibration.prepared import batches
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import block_linears, find_blocks, find_decoder
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_hooks import install_typing
from optimum_freeact.type_rules import resolve
from optimum_freeact.type_state import attach_state


INPUTS = {"q_proj": "q+k+v", "o_proj": "o", "gate_proj": "gate+up", "down_proj": "down"}


@torch.no_grad()
def loudness(model: nn.Module, samples: Any, n_samples: int = 8) -> list[dict]:
    """Rows for each type and kind of input: the loudest percent's energy over the type's median, in the block where it is most.

    Args:
        model: In full precision.
        samples: Its arguments, or token ids `(n, length)`.
    """
    config, mask_id = FreeActConfig(), getattr(model.config, "mask_token_id", None)
    samples = samples[:n_samples]
    if isinstance(samples, torch.Tensor) and mask_id is not None:
        samples = mask_samples(samples, mask_id, seed=0)
    names, rules = resolve(model, config.token_types, config.type_rules, None)
    state, device = attach_state(model), next(model.parameters()).device
    handles = install_typing(model, find_decoder(model), TokenTyper(names, rules, None), state)
    prefix, blocks = find_blocks(model)
    seen: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(key: tuple[str, int]):
        def hook(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
            types = state.of(args[0])
            if types is not None:
                seen.setdefault(key, []).append((args[0].float().square().sum(-1).flatten(), types.flatten()))

        return hook

    for index, block in enumerate(blocks):
        for name, linear in block_linears(block, f"{prefix}.{index}", None).items():
            shown = INPUTS.get(name.rpartition(".")[2])
            if shown:
                handles.append(linear.register_forward_pre_hook(note((shown, index))))
    try:
        for inputs in batches(samples, 4):
            model(
                **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
        state.types = None
    rows: dict[tuple[str, str], dict] = {}
    for (shown, index), parts in seen.items():
        energy, types = (torch.cat(part) for part in zip(*parts, strict=True))
        for kind, name in enumerate(names):
            own = energy[types == kind]
            if len(own) < 100:
                continue
            loud = float(torch.quantile(own[:1_000_000], 0.99) / own.median().clamp_min(1e-30))
            if loud > rows.get((name, shown), {"value": 0.0})["value"]:
                rows[name, shown] = {"metric": "loudness", "type": name, "input": shown, "block": index, "value": loud}
    return list(rows.values())
