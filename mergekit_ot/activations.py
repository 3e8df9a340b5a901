"""Record what a model computes at matched rows: the stream at every depth, and each block's q, k, v, heads and neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from mergekit_ot.rows import RowStore
from mergekit_ot.structure import ATTENTION_NORM, Structure


if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: One text as one model sees it: token ids and the positions to record.
ModelText = tuple[list[int], list[int]]
#: Up to this size a model runs in float32 on every device.
FLOAT32_PARAMETERS = 1_000_000_000


def load_backbone(model: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model without its head, unless `dtype` says otherwise in float32; large ones off the CPU in bfloat16."""
    from transformers import AutoModel
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the head is left out on purpose; its absence is no news
    try:
        loaded = AutoModel.from_pretrained(model, dtype=dtype or (torch.float32 if device == "cpu" else "auto"))
    finally:
        logging.set_verbosity(level)
    if dtype is None and device != "cpu":
        loaded = loaded.to(torch.float32 if loaded.num_parameters() <= FLOAT32_PARAMETERS else torch.bfloat16)
    return loaded.to(device).eval()


class Recorder:
    """Hooks on a decoder that write the recorded rows of each forward into a store.

    Args:
        model (`PreTrainedModel`): a decoder without head (`.layers`, `.norm`).
        structure ([`Structure`]): its shape.
        sink (`Callable[[str, torch.Tensor], None]`): receives `(array name, rows)`.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, sink: Callable[[str, torch.Tensor], None]):
        self.sink = sink
        self.index: tuple[torch.Tensor, torch.Tensor] | None = None
        self.handles: list = []
        for i, layer in enumerate(model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._on_input(getattr(layer, ATTENTION_NORM), f"stream.{2 * i}")
            self._on_input(getattr(layer, structure.family.mlp_norm), f"stream.{2 * i + 1}")
            for site in ("q", "k", "v"):
                self._on_output(getattr(attention, f"{site}_proj"), f"{site}.{i}")
            self._on_input(attention.o_proj, f"o_in.{i}")
            self._on_input(mlp.down_proj, f"h.{i}")
        self._on_input(model.norm, f"stream.{2 * len(model.layers)}")

    def _take(self, name: str, values: torch.Tensor) -> None:
        self.sink(name, values[self.index])  # (rows of this batch, width)

    def _on_input(self, module: torch.nn.Module, name: str) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self._take(name, args[0])))

    def _on_output(self, module: torch.nn.Module, name: str) -> None:
        self.handles.append(module.register_forward_hook(lambda _, __, output: self._take(name, output)))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def record(
    model: PreTrainedModel,
    structure: Structure,
    texts: Sequence[ModelText],
    store: RowStore,
    *,
    batch_size: int = 8,
    quiet: bool = False,
) -> None:
    """Run the texts and append their rows to the store, continuing after the batches it already holds.

    Args:
        model (`PreTrainedModel`): decoder without head, in eval mode.
        texts (`Sequence[tuple[list[int], list[int]]]`): token ids and recorded positions of every text.
        batch_size (`int`, *optional*, defaults to 8): texts per forward, padded on the right.

    Raises:
        `ValueError`: for activations that are not finite, naming model, site and layer.
    """
    device = next(model.parameters()).device

    def keep(name: str, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{structure.name}: activations at {name} are not finite; look for damaged weights in its files."
            )
        store.append(name, values)

    recorder = Recorder(model, structure, keep)
    starts = range(0, len(texts), batch_size)
    try:
        bar = tqdm(starts, desc=f"activations of {Path(structure.name).name}", disable=quiet)
        for number, start in enumerate(bar):
            if number < store.batches:
                continue
            batch = texts[start : start + batch_size]
            length = max(len(ids) for ids, _ in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for b, (tokens, _) in enumerate(batch):
                ids[b, : len(tokens)] = torch.tensor(tokens)
                mask[b, : len(tokens)] = 1
            which = torch.tensor([b for b, (_, rows) in enumerate(batch) for _ in rows])
            where = torch.tensor([row for _, rows in batch for row in rows])
            recorder.index = (which.to(device), where.to(device))
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            store.append("tokens", ids[which, where].reshape(-1, 1))
            store.commit(len(which))
    finally:
        recorder.remove()
