"""Adaptation on top of TRL's SFTTrainer: a frozen residual in the weights, a donor's lessons in the loss, or both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from mergekit_ot.adaptation import fold_residuals
from mergekit_ot.teacher import Lesson, distribution_loss, stream_loss


@dataclass
class TransportSFTConfig(SFTConfig):
    """`SFTConfig` plus the weights of the two teacher losses.

    Args:
        distribution_weight (`float`, *optional*, defaults to 0.5): share of the donor's transported next-token
            distribution in the loss; the text's own next tokens keep the rest.
        stream_weight (`float`, *optional*, defaults to 0.0): factor on the distance to the donor's transported stream.
    """

    distribution_weight: float = field(
        default=0.5, metadata={"help": "Share of the donor's distribution in the loss."}
    )
    stream_weight: float = field(default=0.0, metadata={"help": "Factor on the distance to the donor's stream."})

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.distribution_weight <= 1.0:
            raise ValueError(f"distribution_weight must lie in [0, 1], got {self.distribution_weight}.")
        if self.stream_weight < 0.0:
            raise ValueError(f"stream_weight must not be negative, got {self.stream_weight}.")


def lesson_rows(lessons: list[Lesson]) -> list[dict[str, Any]]:
    """Lessons as dataset rows: token ids, and the lesson itself by its number."""
    return [{"input_ids": lesson.ids.tolist(), "lesson": i} for i, lesson in enumerate(lessons)]


class TransportSFTTrainer(SFTTrainer):
    """`SFTTrainer` that also learns from a donor's lessons.

    The delta: batches carry the number of their lesson, and the loss becomes `(1 - w) · next tokens + w · donor
    distribution + s · stream distance`. With both weights at 0 it is SFTTrainer. Models prepared with
    `attach_residuals` train their base weights only; `fold` ends that.

    Args:
        lessons (`list[Lesson]`): as made by `prepare_lessons`; the train dataset is `lesson_rows(lessons)`.
    """

    def __init__(self, *args, lessons: list[Lesson], **kwargs):
        self.lessons = lessons
        config, longest = kwargs.get("args"), max((len(lesson.ids) for lesson in lessons), default=0)
        limit = getattr(config, "max_length", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"max_length={limit} would cut texts of {longest} tokens, and lessons past the cut have no place; raise "
                "max_length, or match the texts with a smaller one (`match_text(..., max_length=...)`)."
            )
        super().__init__(*args, data_collator=kwargs.pop("data_collator", None) or self._collate, **kwargs)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        labels = pad_sequence(ids, batch_first=True, padding_value=-100)
        lesson = torch.tensor([row["lesson"] for row in rows])
        padded = pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels, "lesson": lesson}

    _signature_columns: list[str]  # the host's

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "lesson" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "lesson"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mix the next-token loss with the donor's lessons."""
        numbers = inputs.pop("lesson")
        share, factor = self.args.distribution_weight, self.args.stream_weight
        if share == 0.0 and factor == 0.0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if factor:
            inputs["output_hidden_states"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        taught, near = [], []
        for row, number in enumerate(numbers.tolist()):
            lesson = self.lessons[number]
            where = lesson.rows.to(outputs.logits.device)
            answers = lesson.tokens.to(where.device), lesson.probabilities.to(where.device)
            taught.append(distribution_loss(outputs.logits[row, where], *answers))
            if factor:
                near.append(stream_loss(outputs.hidden_states[-2][row, lesson.state_rows], lesson.states))
        mode = "train" if self.model.training else "eval"
        lessons = torch.stack(taught).mean()
        self._metrics[mode]["donor_cross_entropy"].append(float(lessons.detach()))
        loss = (1 - share) * loss + share * lessons + (factor * torch.stack(near).mean() if factor else 0.0)
        return (loss, outputs) if return_outputs else loss

    def fold(self) -> int:
        """Make the model ordinary again; returns how many weights carried a residual."""
        return fold_residuals(self.accelerator.unwrap_model(self.model))
