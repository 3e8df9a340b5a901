"""The translations column is built as asked, or refused with a reason."""

import pytest
from datasets import Dataset

from trl_mlc.parallel import from_flat_columns, join_translations, shuffled_translations
from trl_mlc.prompts import prompt_group


def test_flat_columns_become_one():
    data = Dataset.from_dict({"prompt": ["hi", "bye"], "prompt_sw": ["habari", None], "prompt_zh": ["ni", "zai"]})
    found = from_flat_columns(data)
    assert set(found.column_names) == {"prompt", "prompt_translations"}
    assert prompt_group(found[0], "en") == {"en": "hi", "sw": "habari", "zh": "ni"}
    assert prompt_group(found[1], "en") == {"en": "bye", "zh": "zai"}
    assert prompt_group(from_flat_columns(data, languages=["zh"])[0], "en") == {"en": "hi", "zh": "ni"}


def test_turn_lists_become_messages():
    def turns(text):
        return [{"from": "system", "value": "s"}, {"from": "human", "value": text}]

    data = Dataset.from_dict({"prompt": [turns("hi")], "prompt_sw": [turns("habari")]})
    group = prompt_group(from_flat_columns(data)[0], "en")
    assert group["en"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert group["sw"][1] == {"role": "user", "content": "habari"}


def test_join_by_order_and_by_key():
    data = Dataset.from_dict({"prompt": ["a", "b", "c"], "id": [7, 8, 9]})
    found = join_translations(data, {"sw": ["x", None, "z"], "bn": {8: "y"}}, key="id")
    assert [prompt_group(row, "en") for row in found] == [
        {"en": "a", "sw": "x"},
        {"en": "b", "bn": "y"},
        {"en": "c", "sw": "z"},
    ]


def test_shuffled_translations_leave_none_in_place():
    data = Dataset.from_dict({"prompt": [str(i) for i in range(9)]})
    data = join_translations(data, {"sw": [f"s{i}" for i in range(9)], "bn": [f"b{i}" for i in range(9)]})
    mixed = shuffled_translations(data, seed=1)
    assert sorted(t["sw"] for t in mixed["prompt_translations"]) == [f"s{i}" for i in range(9)]
    for row in mixed:
        given = row["prompt_translations"]
        assert given["sw"][1:] != row["prompt"]
        assert given["sw"][1:] == given["bn"][1:], "a row's translations stay together"
    assert shuffled_translations(data, seed=1)["prompt_translations"] == mixed["prompt_translations"]


def test_translations_shuffled_each_on_its_own_are_no_longer_each_other_s():
    data = Dataset.from_dict({"prompt": [str(i) for i in range(40)]})
    tables = {"sw": [f"s{i}" for i in range(40)], "bn": [f"b{i}" for i in range(39)] + [None]}
    mixed = shuffled_translations(join_translations(data, tables), seed=1, each=True)
    given = [prompt_group(row, "en") for row in mixed]
    assert sorted(g["sw"] for g in given) == sorted(tables["sw"])
    assert sum("bn" in g for g in given) == 39
    assert all(g["sw"][1:] != g["en"] and g.get("bn", " ")[1:] != g["en"] for g in given)
    assert sum(g["sw"][1:] == g.get("bn", " ")[1:] for g in given) < 5
    again = shuffled_translations(join_translations(data, tables), seed=1, each=True)
    assert again["prompt_translations"] == mixed["prompt_translations"]


def test_what_cannot_be_joined():
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="1 entries, the dataset 2"):
        join_translations(data, {"sw": ["x"]})
    with pytest.raises(ValueError, match="say with key="):
        join_translations(data, {"sw": {"a": "x"}})
    with pytest.raises(ValueError, match=r"key='id' is not one of the columns \['prompt'\]"):
        join_translations(data, {"sw": {1: "x"}}, key="id")
    with pytest.raises(ValueError, match=r"no columns prompt_\*"):
        from_flat_columns(data)
    with pytest.raises(ValueError, match="'prompt_xx'"):
        from_flat_columns(data.add_column("prompt_sw", ["x", "y"]), languages=["xx"])
