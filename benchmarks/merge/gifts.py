"""What a donor gives to `adaptation.py`: lessons on texts, texts that it writes itself, transported weights and streams.

A giver is `real`, `random` (the donor's architecture with random weights) or `target` (the target itself: the control for
everything that is not the donor's knowledge).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.merge.kit import LENGTH, TARGET, TASKS, Kit, plans_of
from mergekit_ot.anchors import MatchedText, match_text
from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.controls import random_donor
from mergekit_ot.spelling import Spelling
from mergekit_ot.teacher import Lesson, prepare_lessons
from mergekit_ot.writing import continuations
from tools.assets import fetch


#: Continuations kept per position; texts read together.
TOP, READ_TOGETHER = 64, 16
#: A giver's own texts: samples per adaptation text, tokens of it that they go on from, tokens added, likeliest choices
#: drawn from, temperature, samples computed together.
WRITINGS, PROMPT, WRITTEN, CHOICES, TEMPERATURE, WRITTEN_TOGETHER = 8, 24, 136, 64, 0.8, 640


@dataclass(frozen=True)
class Lessons:
    """Lessons of equal length, padded, one row per text: `(n, length)` and what comes after it."""

    ids: torch.Tensor
    lengths: torch.Tensor
    taught: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    stated: torch.Tensor
    states: torch.Tensor

    def pick(self, which: Sequence[int]) -> Lessons:
        """Some of the texts."""
        index = torch.as_tensor(which, dtype=torch.long, device=self.ids.device)
        return Lessons(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: str) -> Lessons:
        return Lessons(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)


def dense(lessons: list[Lesson], length: int = LENGTH) -> Lessons:
    """Pad lessons; probabilities and states in half precision."""
    count, top = len(lessons), lessons[0].tokens.shape[-1]
    width = lessons[0].states.shape[-1] if lessons[0].states is not None else 0
    ids, taught = torch.zeros(count, length, dtype=torch.int32), torch.zeros(count, length, dtype=torch.bool)
    tokens = torch.zeros(count, length, top, dtype=torch.int32)
    probabilities = torch.zeros(count, length, top, dtype=torch.half)
    stated, states = torch.zeros_like(taught), torch.zeros(count, length, width, dtype=torch.half)
    for i, lesson in enumerate(lessons):
        ids[i, : len(lesson.ids)] = lesson.ids.int()
        taught[i, lesson.rows] = True
        tokens[i, lesson.rows] = lesson.tokens.int()
        probabilities[i, lesson.rows] = lesson.probabilities.half()
        if lesson.states is not None:
            stated[i, lesson.state_rows] = True
            states[i, lesson.state_rows] = lesson.states.half()
    lengths = torch.tensor([len(lesson.ids) for lesson in lessons])
    return Lessons(ids, lengths, taught, tokens, probabilities, stated, states)


def shuffled(lessons: Lessons, seed: int) -> Lessons:
    """The same distributions, dealt out anew to the taught positions of all texts."""
    where = lessons.taught.nonzero(as_tuple=True)
    order = torch.randperm(len(where[0]), generator=torch.Generator().manual_seed(seed))
    tokens, probabilities = lessons.tokens.clone(), lessons.probabilities.clone()
    tokens[where], probabilities[where] = tokens[where][order], probabilities[where][order]
    return replace(lessons, tokens=tokens, probabilities=probabilities)


class Givers:
    """The givers of one task.

    Args:
        kit ([`Kit`]): its texts.
        scratch (`Path`): for the random donors' checkpoints.
        device (`str`): where models run.
    """

    def __init__(self, kit: Kit, scratch: Path, device: str):
        self.kit, self.scratch, self.device = kit, scratch, device
        self.target = fetch(TARGET)

    @cached_property
    def donor(self) -> Path:
        """Checkpoint of the real donor."""
        return fetch(TASKS[self.kit.task].donor)

    def folder(self, giver: str, seed: int | None) -> Path:
        """Checkpoint of a giver."""
        if giver != "random":
            return self.donor if giver == "real" else self.target
        out = self.scratch / f"random-{self.kit.task}-{seed}-{os.getpid()}"  # another process may be making its own
        return out if out.is_dir() else random_donor(self.kit.folder / "donor", out, seed=seed)

    @torch.no_grad()
    def lead(self, count: int = 64) -> float:
        """How much less the donor loses than the target on the same characters, in nats per token of the target."""
        models, loss, tokens = (self._model("target", None), self._model("real", None)), [0.0, 0.0], 0
        for text in self.kit.train[:count]:
            if len(text.target_rows) < 2:
                continue
            for side, (ids, rows) in enumerate(
                ((text.target_ids, text.target_rows), (text.donor_ids, text.donor_rows))
            ):
                read = torch.tensor([ids[: rows[-1] + 1]], device=self.device)
                logits = models[side](input_ids=read, use_cache=False).logits[0, rows[0] : -1].float()
                loss[side] += float(torch.nn.functional.cross_entropy(logits, read[0, rows[0] + 1 :], reduction="sum"))
            tokens += text.target_rows[-1] - text.target_rows[0]
        return (loss[0] - loss[1]) / tokens

    def lessons(self, giver: str, seed: int | None, inside: bool = True) -> Lessons:
        """What a giver says on all adaptation texts of the kit."""
        made = self._teach(giver, self._model(giver, seed), self.kit.train, inside)
        if len(made) != len(self.kit.train):
            raise ValueError(
                f"{len(self.kit.train) - len(made)} texts of {self.kit.task} teach nothing; choose others."
            )
        return made

    def written(self, giver: str, seed: int, part: list[int]) -> Lessons:
        """What a giver writes on from the first tokens of some texts, and what it says on that."""
        model, texts = self._model(giver, seed), [self.kit.train[i] for i in part]
        options = {"samples": WRITINGS, "new_tokens": WRITTEN, "choices": CHOICES, "temperature": TEMPERATURE}
        options |= {"together": WRITTEN_TOGETHER, "seed": seed}
        if giver == "target":
            rows = continuations(model, [text.target_ids[:PROMPT] for text in texts], **options)
            return self._teach(giver, model, [MatchedText(row, row, [], []) for row in rows])
        tokenizers = [AutoTokenizer.from_pretrained(path) for path in (self.target, self.donor)]
        rows = continuations(model, [text.donor_ids[:PROMPT] for text in texts], **options)
        said = [tokenizers[1].decode(row, skip_special_tokens=True).rstrip("\ufffd") for row in rows]
        return self._teach(
            giver, model, [match_text(text, *tokenizers, max_length=LENGTH, skip=0) for text in said if text]
        )

    def plans(self, giver: str, seed: int | None) -> dict:
        """Transported attention weights, and lessons with transported streams."""
        folder = self.folder(giver, seed)
        bundle, transporter = plans_of(self.kit, self.target, folder, self.device)
        read, weights = CheckpointReader(self.target), {}
        for name in read.names():
            if ".self_attn." in name and name.endswith("_proj.weight"):
                moved = transporter.transport(name, read(name).float())
                if moved is not None:
                    weights[name] = moved.half().cpu()
        stream_map = bundle.tensors["residual.to_target"]
        lessons = self._teach(giver, self._model(giver, seed), self.kit.train, stream_map=stream_map)
        return {"weights": weights, "lessons": lessons}

    def _model(self, giver: str, seed: int | None):
        kind = torch.float32 if self.device == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_pretrained(self.folder(giver, seed), dtype=kind).to(self.device).eval()

    def _teach(
        self, giver: str, model, texts: list[MatchedText], inside: bool = True, stream_map: torch.Tensor | None = None
    ) -> Lessons:
        size, spelling = self._target_size(), self.kit.spelling
        if giver == "target":
            spelling = Spelling(tuple((i,) for i in range(size)))
            every = [(text.target_ids, list(range(len(text.target_ids)))) for text in texts]
            texts = [MatchedText(ids, ids, rows, rows) for ids, rows in every]
        together = 1 if self.device == "cpu" else READ_TOGETHER
        lessons = prepare_lessons(
            model, texts, spelling, size, top=TOP, stream_map=stream_map, inside=inside, batch=together
        )
        return dense(lessons)

    def _target_size(self) -> int:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.target).vocab_size
