"""Learning steps recorded as CUDA graphs: a step has some thousand small kernels, and Python takes longer to launch them
than the GPU to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch


logger = logging.getLogger(__name__)
_failed: list[str] = []  # why steps are not recorded in this process


def can_record() -> bool:
    """Whether no recording has failed in this process yet."""
    return not _failed


class StepGraphs:
    """Forward and backward of each batch, recorded once and replayed in every epoch.

    Args:
        step: Runs forward and backward of batch `i` from tensors that are on the device already, adds to the gradients,
            and returns the loss.
        parameters: What the optimizer changes, in place.
        batches: The values of `i`.
    """

    def __init__(
        self, step: Callable[[int], torch.Tensor], parameters: list[torch.nn.Parameter], batches: list[int]
    ) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._losses: dict[int, torch.Tensor] = {}
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        pool = torch.cuda.graph_pool_handle()  # one batch runs at a time
        try:
            with torch.cuda.stream(side):
                step(batches[0])  # libraries allocate their workspaces, and gradients come into being
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                torch._foreach_zero_(gradients)  # whatever is recorded ran before, so that its code is loaded
                torch.cuda.synchronize()
                for i in batches:
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        torch._foreach_zero_(gradients)
                        self._losses[i] = step(i)
                    finally:
                        graph.capture_end()
                    self._graphs[i] = graph
        finally:
            torch.cuda.set_stream(here)
        here.wait_stream(side)

    def __call__(self, i: int) -> torch.Tensor:
        """Gradients and loss of batch `i`; the loss is overwritten by the next call."""
        self._graphs[i].replay()
        return self._losses[i]

    def close(self) -> None:
        """Give the recorded steps' memory back: a pool of its own, which no later tensor would take from."""
        self._graphs.clear()
        self._losses.clear()
        torch.cuda.empty_cache()


def record(
    step: Callable[[int], torch.Tensor], parameters: list[torch.nn.Parameter], batches: list[int], device: torch.device
) -> StepGraphs | None:
    """[`StepGraphs`] on a GPU; `None` elsewhere, and where recording fails, which is said once."""
    if device.type != "cuda" or _failed:
        return None
    try:
        return StepGraphs(step, parameters, batches)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _failed.append(str(error).strip().partition("\n")[0][:200])
        logger.warning("Learning steps cannot be recorded (%s): they run one by one, more slowly.", _failed[0])
        return None
