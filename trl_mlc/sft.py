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

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        columns = set(dataset.column_names or ())  # a stream may not know its columns
        known = {"completion", "messages", "conversations", "input_ids", args.dataset_text_field}
        if "prompt" in columns and formatting_func is None and not columns & known:
            raise ValueError(
                f"The {dataset_name} data has columns {sorted(columns)}: supervised fine-tuning needs a 'completion' beside "
                "'prompt', or 'messages'. Rows with 'chosen' and 'rejected' are for DPO."
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
