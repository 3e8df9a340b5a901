"""One batch's term: the chosen objective, the repulsion, and the numbers worth logging."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_mlc.arguments import MLCArguments
from trl_mlc.collator import to_groups
from trl_mlc.losses import (
    consistency_loss,
    contrast_loss,
    cross_prompt_cosine,
    pairwise_cosine_loss,
    repulsion_loss,
)


NAMES = ("loss", "energy", "cosine_min", "languages", "cross_prompt_cosine", "repulsion", "contrast")


class MLCTerm(NamedTuple):
    """The differentiable scalar, and sums and counts of what is logged (means over all processes follow from them)."""

    loss: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    names: tuple[str, ...]


def mlc_term(representations: torch.Tensor, prompts: dict, args: MLCArguments) -> MLCTerm:
    """Score the representations of a batch's prompts; language 0 is the anchor.

    The mean is over all rows of the batch, as in the paper's 1/N: rows without translations add zero. So it does not
    matter how rows are spread over processes and accumulated batches. `mlc/loss` is logged over rows that have
    something to compare.

    Args:
        representations (`torch.Tensor` of shape `(P, d)`): one per prompt.
        prompts (`dict`): from [`~trl_mlc.collator.collate_prompts`].
        args ([`~trl_mlc.arguments.MLCArguments`]).
    """
    is_anchor = prompts["language"] == 0
    if args.mlc_anchor_detached:
        representations = torch.where(is_anchor.unsqueeze(1), representations.detach(), representations)
    groups, mask = to_groups(representations, prompts)
    found = consistency_loss(
        groups, mask, args.mlc_temperature, args.mlc_sigma_norm, args.mlc_signed, solver=args.mlc_solver
    )
    if args.mlc_objective == "rank1":
        loss = found.loss
    elif args.mlc_objective == "cosine":
        loss = pairwise_cosine_loss(groups, mask)
    else:
        loss = groups.sum() * 0.0
    repulsion = contrast = torch.zeros((), device=loss.device)
    if args.mlc_contrast > 0:
        anchors = to_groups(is_anchor.unsqueeze(1).float(), prompts)[0].squeeze(-1) > 0
        contrast = contrast_loss(groups, mask, anchors, args.mlc_contrast_temperature)
        loss = loss + args.mlc_contrast * contrast
    if args.mlc_repulsion > 0:
        repulsion = repulsion_loss(groups, mask, args.mlc_repulsion_temperature)
        loss = loss + args.mlc_repulsion * repulsion
    compared = mask.sum(1) >= 2
    n = compared.sum().float()
    across = cross_prompt_cosine(groups.detach(), mask)
    pairs = torch.isfinite(across).float()
    each = (found.per_group.detach(), found.energy, found.min_cosine, mask.sum(1).float())
    sums = [torch.where(compared, value, 0.0).sum() for value in each]  # indexing by a mask would wait for a GPU
    sums += [torch.nan_to_num(across), repulsion.detach(), contrast.detach() * pairs]
    counts = [n, n, n, n, pairs, pairs * (args.mlc_repulsion > 0), pairs * (args.mlc_contrast > 0)]
    return MLCTerm(loss, torch.stack([s.float() for s in sums]), torch.stack(counts), NAMES)
