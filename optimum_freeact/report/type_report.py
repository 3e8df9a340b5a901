"""What token types are to each layer: energy spectra, means, and what they save, as one page with pictures.

Measured on the full-precision model, at a few blocks. For each input that linears share, and each type of token:

- `mean_share`: share of the energy that is the type's mean, which centring removes exactly;
- `spectrum`: share of the remaining energy left outside the strongest 0, 1, 2, 4, ... directions;
- `error_plain`: relative error of the linears' output when the rotated input is rounded to 4 bits;
- `error_shared`, `error_typed`: the same about the mean of all tokens, and about the type's own;
- `overlap`: share of the energy that lies in the d/32 directions where the other types have most and this one least: what an
  exclusive subspace of that size would leave out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_freeact.calibration.canvas import one_chain
from optimum_freeact.calibration.exclusive_fit import exclusive_directions
from optimum_freeact.calibration.prepared import batches
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import block_linears, find_blocks, table_groups
from optimum_freeact.modules.twins import find_reader
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.affine import fake_quantize
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair, kron_apply
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_hooks import install_typing
from optimum_freeact.type_rules import resolve
from optimum_freeact.type_state import attach_state


RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
MIN_TOKENS = 8
BITS = 4
EXCLUSIVE = 1 / 32


@dataclass(frozen=True)
class TypeRow:
    """One type at one input; see the module's text for the fields.

    Args:
        block (`int`), input (`str`), type (`str`): Where.
        tokens (`int`): How many were seen.
        energy (`float`): Mean squared norm of the input.
        mean_share, error_plain, error_shared, error_typed, overlap (`float`): Shares.
        spectrum (`list[float]`): At [`RANKS`].
    """

    block: int
    input: str
    type: str
    tokens: int
    energy: float
    mean_share: float
    error_plain: float
    error_shared: float
    error_typed: float
    overlap: float
    spectrum: list[float]


@torch.no_grad()
def measure_types(
    model: nn.Module, samples: torch.Tensor | list[dict], config: FreeActConfig, n_blocks: int = 6, batch_size: int = 4
) -> list[TypeRow]:
    """Rows of a full-precision model.

    Args:
        model: A transformers model that is not quantized.
        samples (`torch.Tensor` of shape `(n, length)`, or `list[dict]`): Token ids, or the model's arguments.
        config ([`FreeActConfig`]): Its `token_types`, `type_rules` and `typer` are used.
        n_blocks (`int`, *optional*, defaults to 6): How many blocks, spread evenly.
        batch_size (`int`, *optional*, defaults to 4): Samples a forward.
    """
    names, rules = resolve(model, config.token_types, config.type_rules, config.typer)
    prefix, blocks = find_blocks(model)
    chosen = sorted({round(i) for i in torch.linspace(0, len(blocks) - 1, min(n_blocks, len(blocks))).tolist()})
    state, device = attach_state(model), next(model.parameters()).device
    places: dict[tuple[int, str], tuple[Moments, list[nn.Linear]]] = {}
    typer = TokenTyper(names, rules, config.typer)
    handles = install_typing(model, find_reader(model), typer, state)
    for index in chosen:
        linears = block_linears(blocks[index], f"{prefix}.{index}", None)
        text_config = getattr(model.config, "text_config", model.config)
        groups = table_groups(text_config.model_type, linears) or [[name] for name in linears]
        for group in groups:
            readers = [linears[name] for name in group]
            moments = Moments(readers[0].in_features, len(names), device, n_rows=2048)
            shown = "+".join(name.rpartition(".")[2].removesuffix("_proj") for name in group)
            places[index, shown] = moments, readers
            handles.append(readers[0].register_forward_pre_hook(_note(moments, state)))
    try:
        with one_chain(model, samples, typer, state):
            for inputs in batches(samples, batch_size):
                on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                model(**on_device, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        state.types = None
    rows = []
    for (index, shown), (moments, readers) in places.items():
        rows += _rows(index, shown, moments, readers, names)
    return rows


def _note(moments: Moments, state: Any):
    def hook(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
        types = state.of(args[0])
        types = torch.zeros(args[0].shape[:-1], dtype=torch.long, device=args[0].device) if types is None else types
        moments.update(args[0].flatten(0, -2), types.flatten())

    return hook


def _rows(index: int, shown: str, moments: Moments, readers: list[nn.Linear], names: list[str]) -> list[TypeRow]:
    weight = torch.cat([linear.weight.detach().double() for linear in readers])
    generator = torch.Generator().manual_seed(0)
    a, b = factor_pair(weight.shape[1])
    left, right = (flat_rotation(n, generator).to(weight) for n in (a, b))
    v = kron_apply(weight, left, right)
    samples, types = moments.rows
    zero, mean = torch.zeros_like(moments.shift[0]), moments.mean()
    found = []
    for kind, name in enumerate(names):
        own = samples[types == kind].double()
        if moments.count[kind] < MIN_TOKENS or not len(own):
            continue
        second, centred = moments.covariance(kind, zero), moments.covariance(kind, moments.mean(kind))
        energy = float(second.diagonal().sum())
        values = torch.linalg.eigvalsh(centred).flip(0).clamp_min(0)
        left_over = 1 - torch.cumsum(values, 0) / values.sum().clamp_min(1e-30)
        spectrum = [1.0] + [float(left_over[min(r, len(values)) - 1]) for r in RANKS[1:]]

        def error(centre: torch.Tensor, own: torch.Tensor = own) -> float:
            z = kron_apply(own - centre, left, right)
            noise = fake_quantize(z, BITS, False, 1.0) - z
            return float((noise @ v.mT).square().sum() / (own @ weight.mT).square().sum().clamp_min(1e-30))

        others = [k for k in range(len(names)) if k != kind and moments.count[k] >= MIN_TOKENS]
        overlap = 0.0
        if others:
            mixed = sum(moments.count[k] * moments.covariance(k, zero) for k in others)
            mixed = mixed / sum(moments.count[k] for k in others)
            directions = exclusive_directions(second, mixed, max(1, int(len(second) * EXCLUSIVE)))
            overlap = float((directions.mT @ second @ directions).diagonal().sum() / max(energy, 1e-30))
        tokens = int(moments.count[kind])
        share = 1 - float(centred.diagonal().sum()) / max(energy, 1e-30)
        errors = error(zero), error(mean), error(moments.mean(kind))
        found.append(TypeRow(index, shown, name, tokens, energy, share, *errors, overlap, spectrum))
    return found


def write_report(rows: list[TypeRow], folder: Path, title: str, records: list | None = None) -> Path:
    """Write `token_types.json`, the page `token_types.md`, and its pictures where matplotlib is installed.

    Args:
        rows: From [`measure_types`].
        folder (`Path`): Made if it is not there.
        title (`str`): What the model is called.
        records (*optional*): Calibration records of the quantized model, for the exclusive sizes that were chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        f"{r.block} {'+'.join(i.linears)}": i.exclusive for r in records or [] for i in r.inputs if any(i.exclusive)
    }
    document = {"title": title, "ranks": RANKS, "rows": [asdict(row) for row in rows], "exclusive": sizes}
    source = folder / "token_types.json"
    source.write_text(json.dumps(document, indent=1), encoding="utf-8")
    from optimum_freeact.report import type_plots

    pictures = type_plots.plot_types(source, folder) if type_plots.available() else []
    page = folder / "token_types.md"
    page.write_text(markdown(document, [picture.name for picture in pictures]), encoding="utf-8")
    return page


def markdown(document: dict, pictures: list[str]) -> str:
    """The page."""
    heads = ("block", "input", "type", "tokens", "mean share", "error", "about one mean", "about its own", "overlap")
    lines = [f"# Token types of {document['title']}", "", " ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    lines += [f"![{name}]({name})" for name in pictures]
    lines += ["", "| " + " | ".join(heads) + " |", "| ---: | --- | --- |" + " ---: |" * 6]
    for row in document["rows"]:
        shares = [row[k] for k in ("mean_share", "error_plain", "error_shared", "error_typed", "overlap")]
        cells = [str(row["block"]), row["input"], row["type"], str(row["tokens"]), *(f"{s:.4f}" for s in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    if document["exclusive"]:
        lines += ["", "Exclusive sizes chosen, by type:", ""]
        lines += [f"- block {name}: {sizes}" for name, sizes in document["exclusive"].items()]
    else:
        lines += ["", "No exclusive subspace was chosen at any input."]
    return "\n".join(lines) + "\n"
