"""The bound by which masked-diffusion models are compared."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optimum_freeact.report.evaluate_masked import hide_tokens, score_masked


MASK = 0


class Positions(nn.Module):
    """Predicts by position alone, whatever it reads."""

    def __init__(self, length, vocabulary, shifted=False):
        super().__init__()
        self.told = torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(0)).double()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.config = SimpleNamespace(
            mask_token_id=MASK, shifted_logits=shifted, get_text_config=lambda **_: self.config
        )
        self.read = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        assert use_cache  # so that a quantized cache counts
        self.read.append(input_ids)
        told = self.told.roll(-1, 0) if self.config.shifted_logits else self.told
        return SimpleNamespace(logits=told[None, : input_ids.shape[1]])


def windows_of(n, length, vocabulary=7):
    return torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("n", "length"), [(8, 17), (1, 9), (40, 5), (3, 2)])
def test_each_window_hides_a_share_of_its_own(n, length):
    windows = windows_of(n, length)
    hidden = hide_tokens(windows, MASK)
    there = hidden == MASK
    assert not there[:, 0].any()
    assert torch.equal(hidden[~there], windows[~there])
    expected = [max(1, round((i + 0.5) / n * (length - 1))) for i in range(n)]
    assert sorted(there.sum(1).tolist()) == sorted(expected)
    assert torch.equal(hidden, hide_tokens(windows, MASK))
    if n == 8:
        assert not torch.equal(hidden, hide_tokens(windows, MASK, seed=1))
        assert len({tuple(row) for row in there.tolist()}) == n


@pytest.mark.parametrize("shifted", [False, True])
def test_it_is_the_mean_loss_at_hidden_tokens_window_by_window(shifted):
    model, windows = Positions(9, 7, shifted), windows_of(6, 9)
    hidden = hide_tokens(windows, MASK)
    losses = -model.told.log_softmax(-1).gather(1, windows.T).T  # (windows, positions)
    expected = torch.stack([row[there].mean() for row, there in zip(losses, hidden == MASK)]).mean()
    found = score_masked(model, windows, hidden)
    assert found.nll == pytest.approx(float(expected), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.n_tokens == 6 * 8
    assert torch.equal(torch.cat(model.read), hidden)


def test_for_independent_tokens_the_bound_is_the_likelihood():
    """Where no token tells of another it does not matter which are hidden: averaged, the loss is that of the text."""
    model, window = Positions(9, 7), windows_of(1, 9)
    exact = float(-model.told.log_softmax(-1).gather(1, window.T)[1:].mean())
    many = window.expand(4000, -1)
    found = score_masked(model, many, hide_tokens(many, MASK))
    assert found.nll == pytest.approx(exact, abs=0.02)  # 4000 draws; losses spread by about one


def test_a_model_without_a_mask_token_is_refused():
    model = Positions(9, 7)
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="no mask_token_id"):
        score_masked(model, windows_of(1, 9), windows_of(1, 9))
