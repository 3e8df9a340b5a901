"""Every accepted form of the column, and every refused one."""

import pytest

from trl_mlc.prompts import anchor_prompt, in_place_of, prompt_group, translations_of


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "column",
    [
        {"sw": "habari", "bn": None, "ar": ""},
        [{"lang": "sw", "prompt": "habari"}, {"lang": "bn", "prompt": None}],
    ],
)
def test_missing_languages_are_left_out(column):
    assert translations_of({"prompt_translations": column}) == {"sw": "habari"}


@pytest.mark.parametrize("row", [{}, {"prompt_translations": None}, {"prompt_translations": []}])
def test_rows_without_translations_keep_the_anchor(row):
    assert prompt_group({"prompt": "hello", **row}, "en") == {"en": "hello"}


@pytest.mark.parametrize("bad", ["habari", ["habari"], [{"lang": "sw"}], {"sw": 3}, 7])
def test_wrong_types_show_what_was_got(bad):
    with pytest.raises(ValueError, match="holds .*it must be"):
        translations_of({"prompt_translations": bad})


def test_a_language_twice_is_refused():
    twice = [{"lang": "sw", "prompt": "a"}, {"lang": "sw", "prompt": "b"}]
    with pytest.raises(ValueError, match="'sw' twice"):
        translations_of({"prompt_translations": twice})


def test_anchor_among_the_translations_is_refused():
    with pytest.raises(ValueError, match="anchor language 'en'"):
        prompt_group({"prompt": "hello", "prompt_translations": {"en": "hi"}}, "en")


def test_text_replaces_the_last_user_turn_only():
    assert in_place_of(TURNS, "habari") == [TURNS[0], {"role": "user", "content": "habari"}]
    assert in_place_of("hello", "habari") == "habari"
    messages = [{"role": "user", "content": "habari"}]
    assert in_place_of(TURNS, messages) == messages
    with pytest.raises(ValueError, match="conversational prompt"):
        in_place_of("hello", messages)
    with pytest.raises(ValueError, match="no user turn"):
        in_place_of(TURNS[:1], "habari")


def test_anchor_from_every_dataset_form():
    answer = {"role": "assistant", "content": "a"}
    assert anchor_prompt({"prompt": "hello"}) == "hello"
    assert anchor_prompt({"messages": [*TURNS, answer]}) == TURNS
    assert anchor_prompt({"chosen": [*TURNS, answer], "rejected": [*TURNS, {**answer, "content": "b"}]}) == TURNS
    assert anchor_prompt({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == "The sky is"
    with pytest.raises(ValueError, match=r"columns \['text'\] has no prompt"):
        anchor_prompt({"text": "hello"})


def test_group_order_is_anchor_then_names_and_selection_holds():
    row = {"prompt": "hello", "prompt_translations": {"zu": "z", "ar": "a", "sw": "s"}}
    assert list(prompt_group(row, "en")) == ["en", "ar", "sw", "zu"]
    assert list(prompt_group(row, "en", ["zu", "xx"])) == ["en", "zu"]
