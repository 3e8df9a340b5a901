"""Similarities and costs between the channels of two models, from rows that mean the same thing in both.

Pure tensor functions. Rows are samples (matched token positions), columns are channels. Nothing here knows a model.
"""

from __future__ import annotations

import torch


#: Standard deviations below this share of the largest one count as constant: float16 rows resolve no more.
CONSTANT_SHARE = 1e-6


def require_finite(rows: torch.Tensor, name: str) -> None:
    """Refuse non-finite activations, naming where they are.

    Args:
        rows (`torch.Tensor` of shape `(n_rows, n_channels)`): activations.
        name (`str`): what they are, for the message.

    Raises:
        `ValueError`: naming the first channels that hold NaN or infinity.
    """
    if torch.isfinite(rows).all():
        return
    bad = torch.nonzero(~torch.isfinite(rows).all(dim=0)).flatten()[:5].tolist()
    raise ValueError(
        f"{name}: activations are not finite in channels {bad}; only finite ones can be matched. "
        "Load the model in float32 or bfloat16, or leave out the text that overflows."
    )


def standardise(rows: torch.Tensor) -> torch.Tensor:
    """Centre and scale every channel to unit variance; constant channels become zero.

    Args:
        rows (`torch.Tensor` of shape `(n_rows, n_channels)`): any floating dtype.

    Returns:
        `torch.Tensor` of the same shape, in float32 or the wider input dtype.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    centred = rows - rows.mean(dim=0, keepdim=True)
    deviation = centred.square().mean(dim=0, keepdim=True).sqrt()
    constant = deviation <= CONSTANT_SHARE * deviation.max().clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.where(constant, torch.zeros_like(centred), centred / deviation.masked_fill(constant, 1.0))


def correlation(target: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    r"""Pearson correlation of every target channel with every donor channel.

    Args:
        target (`torch.Tensor` of shape `(n_rows, n_target)`): target activations.
        donor (`torch.Tensor` of shape `(n_rows, n_donor)`): donor activations on the same rows.

    Returns:
        `torch.Tensor` of shape `(n_target, n_donor)` in [-1, 1]; 0 for constant channels.

    Raises:
        `ValueError`: when the row counts differ.
    """
    if target.shape[0] != donor.shape[0]:
        raise ValueError(
            f"Rows must match one to one, got {target.shape[0]} target rows and {donor.shape[0]} donor rows."
        )
    product = standardise(target).T @ standardise(donor)  # (n_target, n_donor)
    return (product / target.shape[0]).clamp_(-1.0, 1.0)


def correlation_cost(similarity: torch.Tensor, *, signed: bool = False) -> torch.Tensor:
    r"""Turn correlations into a cost: \\( 1 - \rho \\) (Eq. 7 of the paper), or \\( 1 - |\rho| \\) when signs are free."""
    return 1.0 - (similarity.abs() if signed else similarity)


def centred_gram(rows: torch.Tensor) -> torch.Tensor:
    """Unit-norm centred Gram matrix of the rows, so that the inner product of two of them is their linear CKA.

    Args:
        rows (`torch.Tensor` of shape `(n_rows, n_channels)`): activations.

    Returns:
        `torch.Tensor` of shape `(n_rows, n_rows)`; all zeros when the rows do not vary (an identity block's update).
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = rows.abs().max()
    if scale == 0:
        return rows.new_zeros(rows.shape[0], rows.shape[0])
    centred = rows / scale
    centred = centred - centred.mean(dim=0, keepdim=True)
    gram = centred @ centred.T
    norm = gram.norm()
    return gram / norm if norm > 1e-10 else torch.zeros_like(gram)


def cka(target: torch.Tensor, donor: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of rows, in [0, 1]; invariant to rotation and scale of the channels."""
    return float((centred_gram(target) * centred_gram(donor)).sum())
