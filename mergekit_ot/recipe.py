"""Recipes: strict reading of a user's YAML and its translation to mergekit's own schema.

mergekit drops keys it does not know, so a misspelt key would silently change nothing. Here every key is known or refused
by name, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from mergekit_ot.alpha import DEFAULT_ALPHA
from mergekit_ot.gate import DEFAULT_MIN_CONFIDENCE, GATES
from mergekit_ot.settings import Calibration, PlanSettings, field_names


class RecipeError(ValueError):
    """A recipe cannot be run; the message names the key."""


TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "calibration", "dtype", "out_dtype", "chat_template")
PLAN_KEYS = field_names(PlanSettings)
FLAT_CALIBRATION = tuple(f"calibration_{name}" for name in field_names(Calibration))
PARAMETER_KEYS = ("donor", "alpha", "plan", "gate", "min_confidence", "control", *PLAN_KEYS, *FLAT_CALIBRATION)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Args:
        target, donor (`str`): folders or hub ids.
        alpha (`object`): mergekit parameter setting: number, gradient, or list of `{filter, value}`.
        calibration ([`Calibration`], *optional*): needed unless `plan` is given.
        settings ([`PlanSettings`]): how plans are solved.
        plan (`str`): folder of solved plans, empty when there is none.
        gate, control (`str`), min_confidence (`float`): see `gate` and `controls`.
        dtype, out_dtype, chat_template (`str`, *optional*): passed to mergekit.
        folder (`Path`): where relative paths start.
        source (`str`): the user's text.
    """

    target: str
    donor: str
    alpha: object = DEFAULT_ALPHA
    calibration: Calibration | None = None
    settings: PlanSettings = field(default_factory=PlanSettings)
    plan: str = ""
    gate: str = "close"
    min_confidence: float = DEFAULT_MIN_CONFIDENCE
    control: str = "none"
    dtype: str | None = None
    out_dtype: str | None = None
    chat_template: str | None = None
    folder: Path = Path(".")
    source: str = ""

    def to_mergekit(self, plan: str | Path, **changes: object) -> dict:
        """The same recipe in mergekit's schema, with solved plans; `changes` replace parameters."""
        parameters = {
            "donor": self.donor,
            "alpha": self.alpha,
            "plan": str(plan),
            "gate": self.gate,
            "min_confidence": self.min_confidence,
            "control": self.control,
        }
        stock = {
            "merge_method": "transport",
            "base_model": self.target,
            "models": [{"model": self.target}],
            "parameters": parameters | changes,
        }
        extra = {"dtype": self.dtype, "out_dtype": self.out_dtype, "chat_template": self.chat_template}
        return stock | {key: value for key, value in extra.items() if value is not None}


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        [`RecipeError`]: for a file that is missing or not YAML, and for everything `parse_recipe` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.")
    try:
        source = path.read_text(encoding="utf-8")
        document = yaml.safe_load(source)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:  # a failing read does not name its file
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that Python refuses
        raise RecipeError(f"{path} is not valid YAML: {_in_one_line(error)}") from error
    return parse_recipe(document, folder=path.parent, source=source)


def _in_one_line(error: Exception) -> str:
    """YAML's message without its quotation of the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})."


def parse_recipe(document: object, *, folder: str | Path = ".", source: str = "") -> Recipe:
    """Validate a recipe in either form: donor under `models`, or donor as a parameter (mergekit's stock schema).

    Raises:
        [`RecipeError`]: naming the key that is unknown, missing or has a value that is not allowed.
    """
    if not isinstance(document, dict):
        raise RecipeError(f"A recipe is a mapping of keys, got {type(document).__name__}.")
    _known(document, TOP_KEYS, "recipe")
    if document.get("merge_method") != "transport":
        raise RecipeError(f"merge_method must be 'transport', got {document.get('merge_method')!r}.")
    parameters = _mapping(document.get("parameters"), "parameters")
    _known(parameters, PARAMETER_KEYS, "parameters")
    folder = Path(folder)
    target = _model(document.get("base_model"), "base_model", folder)
    donor = _donor(document.get("models"), parameters.get("donor"), target, folder)
    gate = parameters.get("gate", "close")
    if gate not in GATES:
        raise RecipeError(f"parameters.gate must be one of {list(GATES)}, got {gate!r}.")
    if parameters.get("control", "none") not in ("none", "shrink", "plain"):
        raise RecipeError(f"parameters.control must be 'none', 'shrink' or 'plain', got {parameters['control']!r}.")
    for key in ("dtype", "out_dtype"):
        if document.get(key) is not None and document[key] not in DTYPES:
            raise RecipeError(f"{key} must be one of {list(DTYPES)}, got {document[key]!r}.")
    calibration = _calibration(document.get("calibration"), parameters)
    plan = parameters.get("plan", "")
    if calibration is None and not plan:
        raise RecipeError("calibration.dataset is missing: name the text on which the models are compared.")
    return Recipe(
        target=target,
        donor=donor,
        alpha=check_alpha(parameters.get("alpha", DEFAULT_ALPHA)),
        calibration=calibration,
        settings=_settings(parameters),
        plan=str(folder / plan) if plan else "",
        gate=gate,
        min_confidence=_number(parameters.get("min_confidence", DEFAULT_MIN_CONFIDENCE), "parameters.min_confidence"),
        control=parameters.get("control", "none"),
        dtype=document.get("dtype"),
        out_dtype=document.get("out_dtype"),
        chat_template=document.get("chat_template"),
        folder=folder,
        source=source,
    )


def check_alpha(setting: object) -> object:
    """Validate an alpha setting: a number, a gradient over depth, or a list of `{filter, value}`; all in [0, 1]."""
    if isinstance(setting, list) and setting and all(isinstance(item, dict) for item in setting):
        for item in setting:
            _known(item, ("filter", "value"), "parameters.alpha")
            if "value" not in item:
                raise RecipeError("parameters.alpha: every entry of the list needs a 'value'.")
            if not isinstance(item.get("filter"), (str, type(None))):
                raise RecipeError(f"parameters.alpha: filter must be part of a tensor's name, got {item['filter']!r}.")
            check_alpha(item["value"])
        return setting
    if isinstance(setting, dict):
        return check_alpha([setting])
    values = setting if isinstance(setting, list) else [setting]
    if not values:
        raise RecipeError("parameters.alpha is an empty list; give a number or a gradient such as [0.0, 0.2].")
    for value in values:
        _number(value, "parameters.alpha")
    return setting


def _number(value: Any, key: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise RecipeError(f"{key} must be a number in [0, 1], got {value!r}.")
    return number


def _known(mapping: dict, allowed: Iterable[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            near = get_close_matches(str(key), list(allowed), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {sorted(allowed)}."
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")


def _mapping(value: object, key: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{key} must be a mapping, got {type(value).__name__}.")
    return value


def _model(value: object, key: str, folder: Path) -> str:
    if value is None or value == "":
        raise RecipeError(f"{key} is missing: give a folder or a hub id.")
    if not isinstance(value, str):
        raise RecipeError(f"{key} must be a folder or a hub id, got {value!r}.")
    if "+" in value and not Path(value).exists():
        raise RecipeError(f"{key}: {value!r} names an adapter (model+lora); merge the LoRA into its model first.")
    near = folder / value
    return str(near.resolve()) if not Path(value).is_absolute() and near.is_dir() else value


def _donor(models: object, parameter: object, target: str, folder: Path) -> str:
    entries = models if isinstance(models, list) else []
    if models is not None and not isinstance(models, list):
        raise RecipeError("models must be a list of entries such as '- model: NAME'.")
    names = []
    for entry in entries:
        entry = _mapping(entry, "models")
        _known(entry, ("model",), "models")
        names.append(_model(entry.get("model"), "models.model", folder))
    donors = [name for name in names if name != target]
    if parameter is not None:
        donors.append(_model(parameter, "parameters.donor", folder))
    donors = [name for name in donors if name != target]
    if len(donors) != 1:
        found = donors or ("the target itself" if len(names) > 1 or parameter is not None else "none")
        raise RecipeError(
            f"A transport merge needs exactly one donor other than base_model {target!r}, got {found}; name it under "
            "models or as parameters.donor."
        )
    return donors[0]


def _calibration(block: object, parameters: dict) -> Calibration | None:
    values = dict(_mapping(block, "calibration"))
    _known(values, field_names(Calibration), "calibration")
    flat = {name.removeprefix("calibration_"): parameters[name] for name in FLAT_CALIBRATION if name in parameters}
    if both := sorted(values.keys() & flat.keys()):
        raise RecipeError(f"calibration.{both[0]} is given twice, in calibration and as a parameter.")
    values |= flat
    if not values:
        return None
    if "dataset" not in values:
        raise RecipeError("calibration.dataset is missing: name the text on which the models are compared.")
    try:
        return Calibration(**values)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _settings(parameters: dict) -> PlanSettings:
    values = {name: parameters[name] for name in PLAN_KEYS if name in parameters}
    modules = values.get("modules")
    if isinstance(modules, str):
        values["modules"] = tuple(part.strip() for part in modules.split(","))
    try:
        return PlanSettings(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"parameters: {error}") from error
