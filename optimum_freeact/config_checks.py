"""What `FreeActConfig` refuses: values out of range, and settings that contradict each other.

The config is passed in untyped, so that it can import this file.
"""

from __future__ import annotations

from typing import Any

from optimum_freeact.config_fields import CHOICES
from optimum_freeact.type_rules import check_names, check_rule


def _check_int(config: Any, name: str, minimum: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")


def check_values(config: Any) -> None:
    """Raise a `ValueError` for the first field whose value is not allowed."""
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
    for name in ("n_samples", "seq_len", "batch_size", "epochs"):
        _check_int(config, name, minimum=1)
    _check_int(config, "low_rank", minimum=0)
    _check_int(config, "type_rank", minimum=0)
    _check_int(config, "discovered_types", minimum=0)
    if (
        config.discovered_types == 1
        or config.discovered_types > 256
        or (config.discovered_types and config.typer is not None)
    ):
        raise ValueError(f"discovered_types must be 0 or 2 to 256, and 0 with a typer, got {config.discovered_types}.")
    _check_int(config, "rounding_passes", minimum=0)
    _check_int(config, "seed", minimum=0)
    for name in ("weight_group_size", "activation_group_size"):
        if getattr(config, name) is not None:
            _check_int(config, name, minimum=2)
    if config.format_version == 1 and config.weight_group_size is not None:
        raise ValueError(
            "This checkpoint has format version 1 with weight_group_size set: its scales of groups were floats, which "
            "this release does not read. Quantize the full-precision model again."
        )
    budget = config.low_rank_budget
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1):
        raise ValueError(f"low_rank_budget must be None or a number between 0 and 1, got {budget!r}.")
    limit = config.loudness_limit
    if limit not in (None, "auto") and (
        isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0
    ):
        raise ValueError(f"loudness_limit must be None, 'auto' or a positive number, got {limit!r}.")
    for name in ("activation_clip", "weight_clip"):
        value = getattr(config, name)
        is_ratio = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        if value != "search" and not is_ratio:
            raise ValueError(f"{name} must be 'search' or a number in (0, 1], got {value!r}.")
    for name in ("damping", "learning_rate", "smooth_alpha"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    if config.kv_rotation is not None and not isinstance(config.kv_rotation, bool):
        raise ValueError(f"kv_rotation must be None, True or False, got {config.kv_rotation!r}.")
    skipped = config.modules_to_not_convert
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(s, str) for s in skipped)):
        raise ValueError(f"modules_to_not_convert must be a list of module names, got {skipped!r}.")


def check_types(config: Any) -> None:
    """Complete token types and their rules in place; raise a `ValueError` for those that cannot be."""
    if config.typer is not None and not callable(config.typer):
        raise ValueError(f"typer must be a callable, got {config.typer!r}.")
    if config.type_rules is not None:
        if not isinstance(config.type_rules, dict):
            raise ValueError(f"type_rules must be a dictionary, got {config.type_rules!r}.")
        config.type_rules = {name: check_rule(name, rule) for name, rule in config.type_rules.items()}
    config.token_types = check_names(config.token_types, config.type_rules, config.typer is not None)
    shares = config.exclusive_share
    shares = list(shares.values()) if isinstance(shares, dict) else [shares]
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 <= s <= 0.5 for s in shares):
        raise ValueError(f"exclusive_share must lie in [0, 0.5], got {config.exclusive_share!r}.")


def check_combinations(config: Any) -> None:
    """Raise a `ValueError` for settings that are allowed, but not together."""
    outputs = config.calibration == "learned" and config.learned_part == "outputs"
    if outputs and (config.weight_bits == 16 or config.learned_start == "random"):
        raise ValueError(
            "learned_part='outputs' tunes what stands behind weights rounded in closed form: use weight_bits 4 or 8 and "
            f"learned_start='closed_form', or learned_part='maps'; got {config.weight_bits} and {config.learned_start!r}."
        )
    maps = config.calibration == "learned" and config.learned_part == "maps"
    if maps and config.transform in ("none", "orthogonal"):
        raise ValueError(
            f"calibration='learned' learns Kronecker factors: use transform='kronecker' or 'hadamard' (as a start), "
            f"got {config.transform!r}."
        )
    if config.sequential and (
        config.calibration == "learned"
        or config.error_correction
        or config.attention_compensation
        or not config.propagate_error
    ):
        raise ValueError(
            "sequential=True goes with calibration='closed_form', propagate_error=True, error_correction=False and "
            f"attention_compensation=False, got {config.calibration!r}, {config.propagate_error}, "
            f"{config.error_correction} and {config.attention_compensation}."
        )
    if config.attention_compensation and (config.calibration == "learned" or config.error_correction):
        raise ValueError(
            "attention_compensation=True corrects a layer in closed form: it goes with calibration='closed_form' and "
            f"error_correction=False, got {config.calibration!r} and {config.error_correction}."
        )
    if config.type_rank and (config.exclusive == "closed_form" or config.error_correction):
        raise ValueError(
            "type_rank > 0 gives types directions of their own in the branch: it goes with exclusive='none' or 'fixed' and "
            f"error_correction=False, got {config.exclusive!r} and {config.error_correction}."
        )
