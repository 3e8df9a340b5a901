"""Direct Preference Optimization with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.mixin import MLCMixin


@dataclass
class MLCDPOConfig(MLCArguments, DPOConfig):
    """[`trl.DPOConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCDPOTrainer(MLCMixin, DPOTrainer):
    """[`trl.DPOTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: the dataset has one more column, `prompt_translations`; logs have `mlc/*`. The reference model never sees
    the translations.
    """

    _mlc_config_class = MLCDPOConfig
