"""The vocabulary plan: what it spells, which positions it can teach, and the distributions, against sums over all tokens."""

import pytest
import torch

from mergekit_ot.anchors import MatchedText, match_text
from mergekit_ot.spelling import Spelling, TaughtRow, spell
from mergekit_ot.vocabulary import shared_tokens
from tests.merge.tiny import texts, tokenizer


PAIRS = [(300, 400), (400, 300), (300, 300)]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request):
    small, large = request.param
    sides = tokenizer(small), tokenizer(large)
    matched = [match_text(text, *sides, max_length=64, skip=0) for text in texts(4, seed=9)]
    return *sides, spell(*sides, large + 10), matched


def test_every_donor_token_is_spelled_as_the_target_would(pair):
    target, donor, spelling, _ = pair
    target_ids, donor_ids = shared_tokens(target, donor)
    for i, j in zip(target_ids.tolist(), donor_ids.tolist()):
        assert target.convert_ids_to_tokens(i) == donor.convert_ids_to_tokens(j)
        assert spelling.pieces[j] == (i,)
    for j in set(range(len(donor))) - set(donor_ids.tolist()):
        assert target.decode(spelling.pieces[j]) == donor.decode([j])
        assert len(spelling.pieces[j]) > 1
    assert not any(spelling.pieces[len(donor) :])
    assert spelling.first.tolist() == [row[0] if row else -1 for row in spelling.pieces]


def test_taught_rows_are_those_where_the_donor_goes_on_as_the_target_does(pair):
    target, donor, spelling, matched = pair
    for text in matched:
        rows = spelling.taught_rows(text)
        shared = spelling.taught_rows(text, inside=False)
        places = [row.target_row for row in rows]
        assert places == sorted(set(places))
        assert {row.target_row for row in shared} <= set(places)
        for row in rows:
            ids, donor_ids = text.target_ids, text.donor_ids
            start = row.target_row - len(row.read)
            assert (start, row.donor_row) in list(zip(text.target_rows, text.donor_rows))
            assert tuple(ids[start + 1 : row.target_row + 1]) == row.read
            steps = list(row.steps) or [donor_ids[row.donor_row + 1]]
            assert donor_ids[row.donor_row + 1 :][: len(steps)] == steps
            spoken = donor.decode(steps)
            assert spoken.startswith(target.decode([*row.read, ids[row.target_row + 1]]))
        if len(donor) != len(target):
            assert len(rows) > 1.5 * len(shared)
        else:  # one tokenizer: every position but the last
            assert places == list(range(len(text.target_ids) - 1))


def test_distributions_are_sums_over_all_donor_tokens(pair):
    target, _, spelling, matched = pair
    size = len(target)
    for text in matched:
        rows = spelling.taught_rows(text)
        draw = torch.Generator().manual_seed(1)
        logits = 2 * torch.randn(len(text.donor_ids), len(spelling.pieces), generator=draw)
        known = torch.log_softmax(logits.masked_fill(spelling.first < 0, float("-inf")), dim=-1)
        found = spelling.distributions(known, text, rows, size)
        for row, values in zip(rows, found):
            wanted = torch.zeros(size, dtype=torch.float64)
            at = known[row.donor_row].double().exp().tolist()
            read = len(row.read)
            for pieces, probability in zip(spelling.pieces, at):
                if len(pieces) > read and pieces[:read] == row.read:
                    wanted[pieces[read]] += probability
            if row.steps:
                whole = 1.0
                for k, step in enumerate(row.steps):
                    whole *= float(known[row.donor_row + k, step].double().exp())
                wanted[spelling.pieces[row.steps[0]][0]] -= whole
                wanted[text.target_ids[row.target_row + 1]] += whole
            torch.testing.assert_close(values.double(), wanted / wanted.sum(), rtol=1e-4, atol=1e-7)


def test_a_prediction_inside_a_word_survives_an_unlikely_word():
    spelling = Spelling(((0,), (1, 2), (1, 3, 0), ()))
    text = MatchedText([0, 1, 2], [0, 1], [0, 2], [0, 1])
    known = torch.tensor([[0.0, -200.0, -201.0, -torch.inf]] * 2)  # exp(-200) is zero in float32
    rows = spelling.taught_rows(text)
    assert rows == [TaughtRow(0, 0), TaughtRow(1, 0, (1,))]
    inside = spelling.distributions(known, text, rows, 4)[1]
    torch.testing.assert_close(inside, torch.tensor([0.0, 0.0, 1.0, 1 / torch.e]) / (1 + 1 / torch.e))
