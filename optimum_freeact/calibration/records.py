"""What calibration reports: plain numbers, JSON-ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class InputRecord:
    """One shared input.

    Args:
        linears (`list[str]`): The linears that read it, relative to the block.
        clip (`list[float]`): Clip ratio per token type.
        rank (`int`): Rank of the high-precision branch.
        mean_share (`float`): Share of the inputs' energy that was subtracted as means.
        activation_error, weight_error (`float`): Energy of the output error over that of the centred output when
            only the activations or only the weights are rounded, on sample rows.
        exclusive (`list[int]`): Coordinates or directions that each type leaves out; empty without exclusive subspaces.
    """

    linears: list[str]
    clip: list[float]
    rank: int
    mean_share: float
    activation_error: float
    weight_error: float
    exclusive: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block: seconds, relative error of its output on the last calibration batch (the mean over tokens,
    each type measured by its own energy), and its inputs.
    """

    block: int
    seconds: float
    output_error: float
    inputs: list[InputRecord] = field(default_factory=list)
    learned: dict | None = None

    def to_dict(self) -> dict:
        """Plain dictionaries and lists."""
        return asdict(self)
