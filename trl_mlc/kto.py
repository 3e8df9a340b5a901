"""Kahneman-Tversky Optimization with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl import KTOConfig, KTOTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.mixin import MLCMixin


@dataclass
class MLCKTOConfig(MLCArguments, KTOConfig):
    """[`trl.KTOConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCKTOTrainer(MLCMixin, KTOTrainer):
    """[`trl.KTOTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: paired data is unpaired by the host, so a prompt then counts twice. The host's KL forward runs first and
    without gradients; the prompts wait for the one with gradients.
    """

    _mlc_config_class = MLCKTOConfig
