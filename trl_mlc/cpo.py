"""Contrastive Preference Optimization (and SimPO) with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.batch_loss import MLCBatchLossMixin


@dataclass
class MLCCPOConfig(MLCArguments, CPOConfig):
    """[`trl.experimental.cpo.CPOConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCCPOTrainer(MLCBatchLossMixin, CPOTrainer):
    """[`trl.experimental.cpo.CPOTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: map-style data with one more column, `prompt_translations`. `loss_type="simpo"` is SimPO.
    """

    _mlc_config_class = MLCCPOConfig
