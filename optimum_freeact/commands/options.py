"""Command-line options made from `FreeActConfig`: its fields, its choices and its docstring; nothing is said twice."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from optimum_freeact.config import FreeActConfig
from optimum_freeact.config_fields import DEFAULTS, RUNTIME
from optimum_freeact.presets import PRESETS


# what a field's values are made of, where no preset and no default shows it
UNSET = {
    "kv_rotation": True,
    "weight_group_size": 128,
    "activation_group_size": 128,
    "low_rank_budget": 0.05,
    "modules_to_not_convert": [],
}


NONE = object()  # what the word "none" stands for: argparse's own None says that an option was left out


def settings() -> list[str]:
    """Every field that `freeact quantize` offers as an option, in the config's order."""
    fields = {name: None for known in (DEFAULTS, *PRESETS.values()) for name in known}
    return [name for name in fields if name not in RUNTIME]


def option_name(field: str) -> str:
    """`weight_bits` -> `--weight-bits`."""
    return "--" + field.replace("_", "-")


def help_texts() -> dict[str, str]:
    """Field -> its text in the docstring of [`FreeActConfig`] (empty where Python strips docstrings)."""
    section = (inspect.getdoc(FreeActConfig) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    texts = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section):
        head = re.match(r"\s*((?:[\w, ]+? \([^)]*\)(?:, )?)+):\s*(.*)", entry, re.DOTALL)
        if head is None:
            continue
        for names in re.findall(r"([\w, ]+?) \([^)]*\)", head[1]):
            for name in filter(None, re.split(r"[,\s]+", names)):
                texts[name] = " ".join(head[2].replace("`", "").split())
    return texts


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return NONE if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it when it refuses a value
    return read


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def reader(field: str) -> dict[str, Any]:
    """How argparse reads a field's value; whether it is allowed is for [`FreeActConfig`] to say."""
    known = [DEFAULTS.get(field), *(preset.get(field) for preset in PRESETS.values()), UNSET.get(field)]
    types = {type(value) for value in known if value is not None}
    if types == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if types == {list}:
        return {"type": _words, "metavar": "A,B"}
    if types in ({int}, {float}, {str}):
        kind = types.pop()
        unset = any(value is None for value in known[:-1]) and field in UNSET
        return {"type": _or_none(kind) if unset else kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
    return {"type": _number_or_word if types <= {int, float, str} and types else _json_or_word, "metavar": "X"}


def add_settings(parser: argparse.ArgumentParser, fields: list[str] | None = None) -> None:
    """Add one option per setting (all by default). What is left out keeps the preset's value."""
    group = parser.add_argument_group("settings (left out: the preset's; in brackets those of 'freeact')")
    texts = help_texts()
    for field in fields or settings():
        default = {**DEFAULTS, **PRESETS["freeact"]}[field]
        shown = ",".join(default) if isinstance(default, list) else default
        text = f"{texts.get(field, '')} [{shown}]".replace("%", "%%").strip()
        group.add_argument(option_name(field), dest=field, default=None, help=text, **reader(field))


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user named."""
    given = {name: getattr(arguments, name, None) for name in settings()}
    return {name: None if value is NONE else value for name, value in given.items() if value is not None}
