"""Which tokens are of which type: rules read from a model's configuration, or given by the user, as plain JSON.

A rule says by which ids, or by which values of another argument of the model's forward, a type's tokens are known:

    {"ids": [126336], "field": "mask_token_id"}
    {"ids": [151655], "field": "image_token_id", "column": "mm_token_type_ids", "values": [1]}
    {"cluster": 3}                  discovered: the ids of one cluster of the table in the config
    {"call": "package.function"}    a callable of the user's, given again when the model is loaded
    {"module": "decoder"}           all tokens of a module inside the base model

`field` names the configuration field that the ids were read from, so that a checkpoint whose configuration says
something else is noticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any


TEXT, SINK, AUTO = "text", "sink", "auto"
CANVAS = "canvas"
# model_type -> the module whose tokens are all of one type: a canvas has no token of its own by which to know it
MODULES = {"diffusion_gemma": {CANVAS: "decoder"}}
# type -> configuration fields that hold its placeholder's id, in transformers' own models and in published remote code
ID_FIELDS = {
    "mask": ("mask_token_id",),
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
# values of transformers' `mm_token_type_ids` (0 is text); Gemma 3 calls the same thing `token_type_ids`
COLUMNS = ("mm_token_type_ids", "token_type_ids")
COLUMN_VALUES = {"image": 1, "video": 2, "audio": 3}
RULE_FIELDS = ("ids", "field", "column", "values", "call", "cluster", "module")


def sub_configs(config: Any) -> Iterable[Any]:
    """A model's configuration, then that of its text part where it has one."""
    yield config
    for name in ("text_config", "llm_config", "language_config"):
        inner = getattr(config, name, None)
        if inner is not None and not isinstance(inner, dict):
            yield inner


def field_value(config: Any, field: str) -> int | None:
    """An id from a model's configuration or its text part; `None` where it is not told."""
    for each in sub_configs(config):
        value = getattr(each, field, None)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def known_rules(model: Any) -> dict[str, dict]:
    """Rules of every type that a model's configuration tells of, in a fixed order.

    Args:
        model: A transformers model; its `config` and the arguments of its `forward` are read.
    """
    arguments = inspect.signature(model.forward).parameters
    column = next((name for name in COLUMNS if name in arguments), None)
    found: dict[str, dict] = {}
    for name, fields in ID_FIELDS.items():
        field = next((f for f in fields if field_value(model.config, f) is not None), None)
        if field is None:
            continue
        found[name] = {"ids": [field_value(model.config, field)], "field": field}
        if name in COLUMN_VALUES and column is not None:
            found[name] |= {"column": column, "values": [COLUMN_VALUES[name]]}
    for name, module in MODULES.get(getattr(model.config, "model_type", ""), {}).items():
        found[name] = {"module": module}
    return found


def check_rule(name: str, rule: Any) -> dict:
    """A user's rule in full form; a list of ids is short for `{"ids": [...]}`.

    Raises:
        `ValueError`: for anything that is no rule; the message shows the forms.
    """
    if isinstance(rule, (list, tuple)):
        rule = {"ids": list(rule)}
    forms = "a list of token ids, or {'column': argument, 'values': [integers]}"
    known = isinstance(rule, dict) and set(rule) <= set(RULE_FIELDS)
    if not known or not ({"ids", "call", "cluster", "module"} & set(rule) or {"column", "values"} <= set(rule)):
        raise ValueError(f"type_rules[{name!r}] must be {forms}, got {rule!r}.")
    for key in ("ids", "values"):
        value = rule.get(key, [0])
        if not isinstance(value, list) or not value or any(type(v) is not int or v < 0 for v in value):
            raise ValueError(f"type_rules[{name!r}][{key!r}] must be a list of integers of at least 0, got {value!r}.")
    return dict(rule)


def check_names(names: Any, rules: dict | None, has_call: bool) -> list[str]:
    """The types' names as a list.

    Raises:
        `ValueError`: if text does not come first, a name comes twice, or none says which tokens are of a type.
    """
    names = list(names) if isinstance(names, tuple) else names
    if not isinstance(names, list) or not names or names[0] != TEXT or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"token_types must be a list that begins with 'text', such as ['text', 'sink', 'auto'], got {names!r}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"token_types must name each type once, got {names!r}.")
    known = {
        TEXT,
        SINK,
        AUTO,
        *ID_FIELDS,
        CANVAS,
        *(rules or {}),
    }
    unknown = [] if has_call else [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"token_types must be of {sorted(known)}, or have a rule; got {names}: add "
            f"type_rules={{{unknown[0]!r}: [token ids]}}."
        )
    missing = sorted(set(rules or {}) - set(names))
    if missing:
        raise ValueError(
            f"type_rules has rules for {missing}, which token_types={names} does not name: add them there."
        )
    return names


def resolve(
    model: Any, names: list[str], rules: dict | None, call: Callable | None, vocab_size: int | None = None
) -> tuple[list[str], dict[str, dict]]:
    """The types a model has: `"auto"` replaced by what its configuration tells, and a rule for each.

    Args:
        model: A transformers model.
        names (`list[str]`): Wanted types.
        rules (`dict`, *optional*): The user's rules.
        call (*optional*): The user's callable, which then decides about all types but the sink.
        vocab_size (`int`, *optional*): Ids must lie below.

    Raises:
        `ValueError`: for a type that neither the user nor the model's configuration tells how to know.
    """
    if call is not None:
        told = f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', type(call).__name__)}".strip(".")
        if AUTO in names or rules:
            raise ValueError(
                f"typer={told} decides about every token, so token_types must name its types and type_rules stay "
                f"empty; got token_types={names}, type_rules={rules}."
            )
        return names, {name: {"call": told} for name in names if name not in (TEXT, SINK)}
    given = {name: check_rule(name, rule) for name, rule in (rules or {}).items()}
    known = known_rules(model)
    wanted = [name for name in names if name != AUTO]
    if AUTO in names:
        wanted += [name for name in known if name not in wanted]
    found = {}
    for name in wanted:
        if name in (TEXT, SINK):
            continue
        rule = given.get(name, known.get(name))
        if rule is None:
            raise ValueError(
                f"token_types names {name!r}, but the model's configuration has none of {list(ID_FIELDS.get(name, ()))}: "
                f"pass type_rules={{{name!r}: [token ids]}}, or leave it out."
            )
        beyond = [i for i in rule.get("ids", ()) if vocab_size is not None and i >= vocab_size and name in given]
        if beyond:
            raise ValueError(f"type_rules[{name!r}] names ids {beyond}, but the vocabulary has {vocab_size} entries.")
        found[name] = rule
    return wanted, found


def check_against(model: Any, rules: dict[str, dict] | None, call: Callable | None) -> None:
    """Refuse a checkpoint whose types do not fit the model's configuration or the callable that is (not) given.

    Raises:
        `ValueError`: naming the type.
    """
    calls = sorted({rule["call"] for rule in (rules or {}).values() if "call" in rule})
    if calls and call is None:
        raise ValueError(
            f"The checkpoint's token types come from the callable {calls[0]}: load it with "
            "quantization_config=FreeActConfig(typer=that callable)."
        )
    if call is not None and not calls:
        raise ValueError(
            f"typer was given, but the checkpoint knows its token types by itself ({sorted(rules or {})}): leave it out."
        )
    for name, rule in (rules or {}).items():
        value = field_value(model.config, rule["field"]) if "field" in rule else None
        if value is not None and value not in rule["ids"]:
            raise ValueError(
                f"The checkpoint was quantized with {name} tokens {rule['ids']}, but the model's configuration has "
                f"{rule['field']}={value}: restore the configuration, or quantize again."
            )
