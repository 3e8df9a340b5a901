"""Questions about a machine that are asked once, by compiled code too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch


Answer = TypeVar("Answer", covariant=True)


class Asked(Protocol[Answer]):
    """A question whose answers are remembered."""

    def __call__(self, *arguments) -> Answer:
        """The answer."""

    def cache_clear(self) -> None:
        """Forget the answers."""


def asked_once(question: Callable[..., Answer]) -> Asked[Answer]:
    """`question` with its answers remembered by its arguments, which `torch.compile` takes as constants. It would trace a function
    that is merely cached, with a warning, and ask it again in each compilation; an error is not remembered.
    """
    remembered = functools.cache(question)

    @torch.compiler.assume_constant_result
    @functools.wraps(question)
    def answer(*arguments):
        return remembered(*arguments)

    answer.cache_clear = remembered.cache_clear
    return answer
