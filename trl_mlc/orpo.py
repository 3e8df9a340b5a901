"""Odds Ratio Preference Optimization with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.batch_loss import MLCBatchLossMixin


@dataclass
class MLCORPOConfig(MLCArguments, ORPOConfig):
    """[`trl.experimental.orpo.ORPOConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCORPOTrainer(MLCBatchLossMixin, ORPOTrainer):
    """[`trl.experimental.orpo.ORPOTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: map-style data with one more column, `prompt_translations`.
    """

    _mlc_config_class = MLCORPOConfig
