"""Reward modelling with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RewardConfig, RewardTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.mixin import MLCMixin


@dataclass
class MLCRewardConfig(MLCArguments, RewardConfig):
    """[`trl.RewardConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCRewardTrainer(MLCMixin, RewardTrainer):
    """[`trl.RewardTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: the representation is the backbone's state at the end of the *prompt*, while the score is read at the end
    of the answer.
    """

    _mlc_config_class = MLCRewardConfig
