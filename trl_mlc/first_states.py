"""What is read from a model's states before training: the layer that `auto` takes, and the first language means."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from trl_mlc.arguments import MLCArguments
from trl_mlc.data import IDS, LANGUAGES
from trl_mlc.early_exit import check_layer, n_layers
from trl_mlc.extractor import LanguageMeans
from trl_mlc.scan import best_layer, complete_groups, prompt_states, scan_layers


logger = logging.getLogger(__name__)


def choose_layer(decoder: nn.Module, rows: Iterable[dict], args: MLCArguments, is_main: bool) -> int:
    """The layer that the options name, or the one whose states best retrieve translations of the first rows.

    Args:
        decoder (`nn.Module`): from [`~trl_mlc.early_exit.decoder_of`].
        rows (`Iterable[dict]`): training rows with tokenized prompts.
        args ([`~trl_mlc.arguments.MLCArguments`]).
        is_main (`bool`): whether this process looks; the others are told.

    Raises:
        `ValueError`: for a layer that is not there, a partitioned model, or fewer than two rows to retrieve from.
    """
    if isinstance(args.mlc_layer, int):
        return check_layer(args.mlc_layer, decoder)
    refuse_partitioned(decoder, "mlc_layer='auto'")
    chosen: list = [None]
    if is_main:
        first = islice(iter(rows), 4 * args.mlc_scan_prompts)
        groups = complete_groups([row for row in first if len(row[IDS]) >= 2], args.mlc_scan_prompts)
        if len(groups) < 2:
            raise ValueError(
                "mlc_layer='auto' needs at least two rows with a common language besides the anchor; name a layer "
                f"from 1 to {n_layers(decoder)}."
            )
        scores = scan_layers(decoder, groups, poolings=[args.mlc_pooling])
        best = best_layer(scores)
        logger.warning(
            "mlc_layer='auto' chose layer %d of %d: retrieval %.2f over %d prompts (chance %.2f), cosine between "
            "different prompts %.3f. Of all layers, %s pooled (retrieval, that cosine): %s",
            best.layer,
            n_layers(decoder),
            best.retrieval,
            len(groups),
            1 / len(groups),
            best.cross_prompt_cosine,
            args.mlc_pooling,
            "; ".join(f"{s.layer}: {s.retrieval:.2f}, {s.cross_prompt_cosine:.3f}" for s in scores),
        )
        chosen = [best.layer]
    return broadcast_object_list(chosen, from_process=0)[0]


def language_means(
    decoder: nn.Module, layer: int, rows: Iterable[dict], args: MLCArguments, languages: int, device: torch.device
) -> LanguageMeans:
    """Means of each language over the first rows, so that the first batch is already centred.

    Args:
        decoder, rows, args: as in [`choose_layer`].
        layer (`int`): whose states are meant.
        languages (`int`): how many are known.
        device (`torch.device`): where the means live.

    Raises:
        `ValueError`: for a partitioned model.
    """
    refuse_partitioned(decoder, f"mlc_center={args.mlc_center!r}")
    first = list(islice(iter(rows), args.mlc_scan_prompts))
    flat = [(ids, n) for row in first for ids, n in zip(row[IDS], row[LANGUAGES], strict=True)]
    states = prompt_states(decoder, [[ids] for ids, _ in flat], [layer], args.mlc_pooling)[0, 0].to(device)
    common = args.mlc_center == "common"
    means = LanguageMeans(languages, states.shape[-1], args.mlc_center_momentum, common, device)
    means.update_(*means.sums(states, torch.tensor([n for _, n in flat], device=device)))
    return means


def refuse_partitioned(decoder: nn.Module, option: str) -> None:
    """States of a partitioned model cannot be read before training.

    Raises:
        `ValueError`: if the decoder is one.
    """
    if any(hasattr(p, "ds_id") or p.is_meta for p in decoder.parameters()):
        raise ValueError(
            f"{option} reads states before training, which a partitioned model cannot give. Run `trl-mlc scan` on "
            "one process and pass the layer as a number, without mlc_center."
        )
