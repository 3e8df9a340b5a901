"""Multi-Lingual Consistency trainers for TRL: preferences taught in one language, kept in all of them.

Importing this package imports nothing heavy; names are looked up when first used.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # for type checkers and editors; names are imported on first use
    from trl_mlc.arguments import MLCArguments as MLCArguments
    from trl_mlc.cpo import MLCCPOConfig as MLCCPOConfig
    from trl_mlc.cpo import MLCCPOTrainer as MLCCPOTrainer
    from trl_mlc.dpo import MLCDPOConfig as MLCDPOConfig
    from trl_mlc.dpo import MLCDPOTrainer as MLCDPOTrainer
    from trl_mlc.evaluation.report import EvaluationReport as EvaluationReport
    from trl_mlc.evaluation.report import evaluate_model as evaluate_model
    from trl_mlc.kto import MLCKTOConfig as MLCKTOConfig
    from trl_mlc.kto import MLCKTOTrainer as MLCKTOTrainer
    from trl_mlc.losses import ConsistencyLoss as ConsistencyLoss
    from trl_mlc.losses import consistency_loss as consistency_loss
    from trl_mlc.mixin import MLCMixin as MLCMixin
    from trl_mlc.orpo import MLCORPOConfig as MLCORPOConfig
    from trl_mlc.orpo import MLCORPOTrainer as MLCORPOTrainer
    from trl_mlc.parallel import from_flat_columns as from_flat_columns
    from trl_mlc.parallel import join_translations as join_translations
    from trl_mlc.parallel import shuffled_translations as shuffled_translations
    from trl_mlc.reward import MLCRewardConfig as MLCRewardConfig
    from trl_mlc.reward import MLCRewardTrainer as MLCRewardTrainer
    from trl_mlc.scan import LayerScore as LayerScore
    from trl_mlc.scan import scan_layers as scan_layers
    from trl_mlc.sft import MLCSFTConfig as MLCSFTConfig
    from trl_mlc.sft import MLCSFTTrainer as MLCSFTTrainer

_HOMES = {
    "ConsistencyLoss": "trl_mlc.losses",
    "EvaluationReport": "trl_mlc.evaluation.report",
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
    "shuffled_translations": "trl_mlc.parallel",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


if not TYPE_CHECKING:  # a checker would believe that every name exists

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
