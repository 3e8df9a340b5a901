"""Read one dataset row: the anchor prompt and its translations, as a tokenizer wants them.

Plain Python on plain rows; nothing here knows a dataset library or a trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


COLUMN = "prompt_translations"
FORMS = '{"sw": "..."} or [{"lang": "sw", "prompt": "..."}], where a prompt is a text or a list of messages'

Prompt = str | list[dict]


def translations_of(row: Mapping, column: str = COLUMN) -> dict[str, Prompt]:
    """The translations a row has, by language; absent, `None` and empty ones are left out.

    Raises:
        `ValueError`: for a value that is none of the accepted forms, or a language given twice.
    """
    value = row.get(column)
    if value is None:
        return {}
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(v, dict) and {"lang", "prompt"} <= v.keys() for v in value):
        pairs = [(v["lang"], v["prompt"]) for v in value]
    else:
        raise ValueError(f"Column {column!r} holds {_shown(value)}; it must be {FORMS}.")
    found: dict[str, Prompt] = {}
    for language, prompt in pairs:
        if prompt is None:
            continue
        if not isinstance(language, str):
            raise ValueError(f"Column {column!r} names a language {_shown(language)}; it must be a text such as 'sw'.")
        if not isinstance(prompt, (str, list)) or not all(isinstance(m, (str, dict)) for m in prompt):
            raise ValueError(
                f"Column {column!r} holds {_shown(prompt)} for language {language!r}; it must be {FORMS}."
            )
        if len(prompt) == 0:
            continue
        if language in found:
            raise ValueError(f"Column {column!r} has language {language!r} twice in one row; keep one of them.")
        found[language] = prompt
    return found


def anchor_prompt(row: Mapping) -> Prompt:
    """The prompt of a row in the anchor language.

    It is the `prompt` column; else the messages before the last assistant turn (`messages`); else what `chosen` and
    `rejected` have in common.

    Raises:
        `ValueError`: if the row has none of them.
    """
    if row.get("prompt") is not None:
        return _checked(row["prompt"], "prompt")
    if row.get("messages") is not None:
        messages = _checked_messages(row["messages"], "messages", _MESSAGES)
        return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _common_start(_checked(row["chosen"], "chosen"), _checked(row["rejected"], "rejected"))
    raise ValueError(
        f"A row with columns {sorted(row)} has no prompt for MLC: give it 'prompt', 'messages', or 'chosen' and "
        "'rejected' with a common beginning."
    )


def _checked(value: Any, column: str) -> Prompt:
    """A column's value if it is a text or a list of messages."""
    return value if isinstance(value, str) else _checked_messages(value, column, _PLAIN)


def _checked_messages(value: Any, column: str, wanted: str) -> list[dict]:
    """A column's value if it is a list of messages."""
    if isinstance(value, list) and all(isinstance(m, dict) for m in value):
        return value
    raise ValueError(f"Column {column!r} holds {_shown(value)}; it must be {wanted}.")


_MESSAGES = 'a list of messages such as {"role": "user", "content": "..."}'
_PLAIN = f"a text or {_MESSAGES}"


def in_place_of(anchor: Prompt, translation: Prompt) -> Prompt:
    """Put a translation where the anchor stood.

    A text replaces a text, or the last user turn of a conversation (system and earlier turns stay); messages are used
    as they are.

    Raises:
        `ValueError`: for messages in place of a text, or a conversation without a user turn.
    """
    if isinstance(translation, list):
        if isinstance(anchor, str):
            raise ValueError("A conversational translation needs a conversational prompt; got a text prompt.")
        return translation
    if isinstance(anchor, str):
        return translation
    users = [i for i, message in enumerate(anchor) if message.get("role") == "user"]
    if not users:
        raise ValueError(f"The prompt {_shown(anchor)} has no user turn to put a translation into.")
    return [{**m, "content": translation} if i == users[-1] else m for i, m in enumerate(anchor)]


def prompt_group(row: Mapping, anchor_language: str, languages: Iterable[str] | None = None) -> dict[str, Prompt]:
    """All languages of a row, the anchor first, then by name.

    Raises:
        `ValueError`: if the anchor language is also among the translations.
    """
    anchor = anchor_prompt(row)
    translations = translations_of(row)
    if anchor_language in translations:
        raise ValueError(
            f"Column {COLUMN!r} also holds the anchor language {anchor_language!r}, which is the row's own prompt. "
            "Remove it from the column, or name the prompt's language with mlc_anchor."
        )
    wanted = sorted(translations) if languages is None else sorted(set(languages) & translations.keys())
    return {anchor_language: anchor, **{name: in_place_of(anchor, translations[name]) for name in wanted}}


def tokenize_prompt(tokenizer, prompt: Prompt, row: Mapping, chat_template: str | None = None) -> list[int]:
    """Token ids of a prompt up to where the answer begins, with the row's tools and template arguments."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    tools, extra = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"Column 'tools' holds {_shown(tools)}, which is no JSON: {error}.") from error
    if chat_template is not None:
        extra = {"chat_template": chat_template, **extra}
    try:
        encoded = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=True, tools=tools, **extra
        )
    except Exception as error:  # a chat template is a program of the tokenizer's author
        raise ValueError(
            f"The tokenizer's chat template refuses the prompt {_shown(prompt)} ({type(error).__name__}: {error})."
        ) from error
    return list(encoded["input_ids"])


def _common_start(chosen: Prompt, rejected: Prompt) -> Prompt:
    length = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        length += 1
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length]


def _shown(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
