"""A batch's prompts: flattened, chosen by language, and back in groups."""

import torch

from trl_mlc.collator import IDS, LANGUAGES, collate_prompts, select_prompts, to_groups


ROWS = [
    {IDS: [[5, 6, 7], [8], [9, 10]], LANGUAGES: [0, 3, 1]},
    {IDS: [], LANGUAGES: []},
    {IDS: [[11]], LANGUAGES: [0]},
    {IDS: [[12, 13], [14, 15, 16, 17], [18], [19, 20]], LANGUAGES: [0, 1, 2, 3]},
]


def test_prompts_lie_in_order_with_padding_on_the_right():
    found = collate_prompts(ROWS, 99)
    assert found["lengths"] == [3, 1, 2, 1, 2, 4, 1, 2]
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.int64
    for ids, mask, length in zip(found["input_ids"], found["attention_mask"], found["lengths"], strict=True):
        assert mask.tolist() == [1] * length + [0] * (4 - length)
        assert ids[length:].tolist() == [99] * (4 - length)
    assert found["input_ids"][5].tolist() == [14, 15, 16, 17]
    assert found["row"].tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert found["slot"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert (found["n_rows"], found["width"]) == (4, 4)


def test_a_batch_without_prompts_holds_one_that_counts_nowhere():
    for found in (collate_prompts(ROWS[1:2], 99), select_prompts(collate_prompts(ROWS, 99), set())):
        assert found["row"].tolist() == [-1]
        groups, mask = to_groups(torch.ones(1, 2), found)
        assert not mask.any()
        assert not groups.any()


def test_groups_of_some_languages_are_as_wide_as_these():
    """With many languages and few of them in a step, the loss must not be computed over all the absent ones."""
    prompts = collate_prompts(ROWS, 0)
    vectors = torch.arange(1.0, 9.0).unsqueeze(1)
    kept = select_prompts(prompts, {0, 3})
    assert kept["width"] == 2
    groups, mask = to_groups(vectors[torch.isin(prompts["language"], torch.tensor([0, 3]))], kept)
    assert groups.squeeze(2).tolist() == [[1, 2], [0, 0], [4, 0], [5, 8]]
    assert mask.tolist() == [[True, True], [False, False], [True, False], [True, True]]
    assert kept["lengths"] == [3, 1, 1, 2, 2]
