"""Supervised fine-tuning with Multi-Lingual Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from trl_mlc.arguments import MLCArguments
from trl_mlc.mixin import MLCMixin


@dataclass
class MLCSFTConfig(MLCArguments, SFTConfig):
    """[`trl.SFTConfig`] with the `mlc_` options of [`MLCArguments`]."""


class MLCSFTTrainer(MLCMixin, SFTTrainer):
    """[`trl.SFTTrainer`] plus `mlc_weight` times the consistency of each row's parallel prompts.

    Delta: prompt-completion or conversational data with one more column, `prompt_translations`; no packing.
    """

    _mlc_config_class = MLCSFTConfig
