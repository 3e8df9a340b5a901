"""The linear map from a hidden state to the space where consistency is measured, and the running language means."""

from __future__ import annotations

import torch
from torch import nn


class Extractor(nn.Module):
    r"""\\( r = W h + b \\) of the paper, or the identity when `dim` is 0.

    With the published settings (266 steps at 6e-7 from a uniform start of width 1/sqrt(d)) the map moves by less than
    1 %: it is then a random projection in all but name. Hence a learning rate of its own, `trainable=False`, and 0.

    Args:
        hidden_size (`int`): width of the hidden states.
        dim (`int`): output width; 0 for the identity, which has no parameters.
        bias (`bool`, *optional*, defaults to `True`).
        trainable (`bool`, *optional*, defaults to `True`): `False` keeps the initial random projection.
        seed (`int`, *optional*, defaults to 0): of the initial values; the global random stream is left untouched.
    """

    def __init__(self, hidden_size: int, dim: int, bias: bool = True, trainable: bool = True, seed: int = 0):
        super().__init__()
        self.proj: nn.Module = nn.Identity()
        if dim > 0:
            self.proj = nn.utils.skip_init(nn.Linear, hidden_size, dim, bias=bias, device="cpu", dtype=torch.float32)
            own = torch.Generator().manual_seed(seed)
            for parameter in self.proj.parameters():  # torch's own start of a linear layer
                nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5, generator=own)
        self.out_features = dim or hidden_size
        self.requires_grad_(trainable)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(P, hidden_size)` to `(P, dim)`, in the parameters' dtype, at least float32 for the identity."""
        weight = getattr(self.proj, "weight", None)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.proj(hidden_states.float() if weight is None else hidden_states.to(weight.dtype))


class LanguageMeans:
    """Running mean of the hidden states of each language, to be subtracted before the extractor.

    The mean says which language is spoken, not what is said; without it raw cosines between any two prompts are
    above 0.95 and the loss sits at its floor. A buffer outside the model: no gradient, no key in its checkpoint.

    Args:
        n_languages (`int`): rows.
        hidden_size (`int`): columns.
        momentum (`float`, *optional*, defaults to 0.99): weight of the past; a language's first batch counts fully.
        common (`bool`, *optional*, defaults to `False`): give every language the mean of all languages' means.
        device (*optional*): where the float32 table lives.
    """

    def __init__(self, n_languages: int, hidden_size: int, momentum: float = 0.99, common: bool = False, device=None):
        self.momentum, self.common = momentum, common
        self.means = torch.zeros(n_languages, hidden_size, device=device)
        self.seen = torch.zeros(n_languages, dtype=torch.bool, device=device)

    def of(self, languages: torch.Tensor) -> torch.Tensor:
        """Means `(P, hidden_size)` for prompts in the languages `(P,)`; a language never seen has zero of its own."""
        if self.common:
            return self.means.sum(0).div(self.seen.sum().clamp_min(1)).expand(len(languages), -1)
        return self.means[languages]

    def sums(self, hidden_states: torch.Tensor, languages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-language sums `(L, hidden_size)` and counts `(L,)` of a batch, ready to be added over processes."""
        total = torch.zeros_like(self.means).index_add_(0, languages, hidden_states.detach().float())
        ones = torch.ones(languages.shape[0], device=languages.device)
        return total, torch.zeros(len(self.seen), device=languages.device).index_add_(0, languages, ones)

    def update_(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Move the means towards the batch (in place) for the languages it holds."""
        here = count > 0
        batch = total / count.clamp_min(1).unsqueeze(1)
        moved = torch.where(self.seen.unsqueeze(1), self.momentum * self.means + (1 - self.momentum) * batch, batch)
        self.means = torch.where(here.unsqueeze(1), moved, self.means)
        self.seen = self.seen | here

    def grow_(self, n_languages: int) -> None:
        """Add rows for languages that only an evaluation set has."""
        missing = n_languages - len(self.seen)
        if missing > 0:
            self.means = torch.cat([self.means, self.means.new_zeros(missing, self.means.shape[1])])
            self.seen = torch.cat([self.seen, self.seen.new_zeros(missing)])
