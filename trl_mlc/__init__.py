"""Multi-Lingual Consistency trainers for TRL: preferences taught in one language, kept in all of them.

Importing this package imports nothing heavy; names are looked up when first used.
"""

import importlib


_HOMES = {
    "ConsistencyLoss": "trl_mlc.losses",
    "LayerScore": "trl_mlc.scan",
    "MLCArguments": "trl_mlc.arguments",
    "MLCCPOConfig": "trl_mlc.cpo",
    "MLCCPOTrainer": "trl_mlc.cpo",
    "MLCDPOConfig": "trl_mlc.dpo",
    "MLCDPOTrainer": "trl_mlc.dpo",
    "MLCKTOConfig": "trl_mlc.kto",
    "MLCKTOTrainer": "trl_mlc.kto",
    "MLCMixin": "trl_mlc.mixin",
    "MLCORPOConfig": "trl_mlc.orpo",
    "MLCORPOTrainer": "trl_mlc.orpo",
    "MLCRewardConfig": "trl_mlc.reward",
    "MLCRewardTrainer": "trl_mlc.reward",
    "MLCSFTConfig": "trl_mlc.sft",
    "MLCSFTTrainer": "trl_mlc.sft",
    "consistency_loss": "trl_mlc.losses",
    "evaluate_model": "trl_mlc.evaluation.report",
    "from_flat_columns": "trl_mlc.parallel",
    "join_translations": "trl_mlc.parallel",
    "scan_layers": "trl_mlc.scan",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
