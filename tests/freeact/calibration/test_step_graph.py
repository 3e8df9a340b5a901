"""What learning does otherwise on a GPU: it follows the inverses, and replays recorded steps."""

import pytest
import torch

from optimum_freeact.api import quantize
from optimum_freeact.calibration import learned, step_graph
from optimum_freeact.calibration.learned import followed_inverse
from optimum_freeact.numerics.hadamard import random_orthogonal
from tests.freeact.test_type_rules import IDS, masked_llama
from tests.helpers.quantized import logits, settings


def test_it_follows_a_walk_of_steps_as_large_as_a_learning_rate_allows():
    generator = torch.Generator().manual_seed(0)
    matrix = random_orthogonal(48, generator).double()
    near = torch.linalg.inv(matrix)
    for _ in range(50):
        matrix = matrix + 5e-3 * torch.randn(48, 48, generator=generator).sign().double()
        found = followed_inverse(matrix, near)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-7, atol=1e-7)


def test_its_gradient_is_the_inverses():
    generator = torch.Generator().manual_seed(1)
    matrix = random_orthogonal(12, generator).double() + 0.05 * torch.randn(12, 12, generator=generator).double()
    weight = torch.randn(12, 12, generator=generator).double()
    gradients = []
    for invert in (torch.linalg.inv, lambda m: followed_inverse(m, torch.linalg.inv(m.detach()))):
        given = matrix.clone().requires_grad_(True)
        (invert(given) * weight).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


class Replayed:
    """Stands for recorded steps on a CPU: the same gradients, zeroed in place."""

    closed: list = []

    def __init__(self, step, parameters, batches):
        step(batches[0])
        self.step, self.parameters = step, parameters

    def close(self):
        self.closed.append(self)

    def __call__(self, i):
        for parameter in self.parameters:
            parameter.grad.zero_()
        return self.step(i)


@pytest.mark.parametrize("preset", ["flatquant", "freeact-paper"])
def test_replayed_steps_learn_what_single_ones_do(preset, monkeypatch):
    monkeypatch.setattr(Replayed, "closed", [])
    plain = quantize(masked_llama(), settings(preset, epochs=2))
    monkeypatch.setattr(
        learned, "record", lambda step, parameters, batches, device: Replayed(step, parameters, batches)
    )
    replayed = quantize(masked_llama(), settings(preset, epochs=2))
    assert torch.equal(logits(replayed, IDS), logits(plain, IDS))
    assert len(Replayed.closed) == 2  # blocks


def test_where_recording_fails_it_is_said_once_and_steps_run_singly(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(step_graph, "StepGraphs", fail)
    monkeypatch.setattr(step_graph, "_failed", [])
    for _ in range(2):
        assert step_graph.record(lambda i: i, [], [0], torch.device("cuda")) is None
    assert [record.getMessage() for record in caplog.records] == [
        "Learning steps cannot be recorded (no graphs here): they run one by one, more slowly."
    ]
    assert not step_graph.can_record()
