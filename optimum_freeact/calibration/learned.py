"""Learned calibration: gradient steps on a block's transforms, channel scales and clips against its output error.

Each linear of the block is replaced for a while by a differentiable twin that computes what the quantized one will
compute, with rounding passed through by the straight-through estimator. The loss is the squared error of the block's
output; it is divided by its own detached value, so that steps do not depend on a block's scale (FlatQuant, 2410.09426,
does the same).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from optimum_freeact.calibration.precision import products
from optimum_freeact.calibration.step_graph import record
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.numerics.affine import choose_qparams, fake_quantize_ste, symmetric_qparams
from optimum_freeact.transforms.affine_map import InputMap, pick


NEWTON_STEPS = 4
CLIP_RATE = 10.0  # clips learn ten times as fast as transforms, as in FlatQuant
# Start of the weights' clip ratios: near the 4-bit optimum of a Gaussian row, or FlatQuant's sigmoid(4)
WEIGHT_CLIP_START = {"closed_form": 0.86, "random": 0.982}


def _logit(ratio: torch.Tensor) -> torch.Tensor:
    return torch.logit(ratio.clamp(0.05, 0.982))  # 0.982: FlatQuant's own start for "no clipping"


def followed_inverse(matrix: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Inverse of a matrix by Newton's iteration from a nearby one, which is brought up to date; differentiable.

    Each iteration squares the error |I - matrix near|: from a quarter, four leave 5e-10. The last carries the gradient,
    which is exact at the inverse.
    """
    twice = 2 * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    with torch.no_grad():
        for _ in range(NEWTON_STEPS - 1):
            near.copy_(near @ (twice - matrix @ near))
    found = near.clone()
    return found @ (twice - matrix @ found)


class LearnedInput(nn.Module):
    """Differentiable twin of a [`FreeActInput`]: learns `left`, `right`, the channel scale and the clips."""

    def __init__(self, source: FreeActInput):
        super().__init__()
        fixed = source.input_map(torch.float32)
        if fixed.left is None or fixed.right is None:
            raise ValueError("Only the factors of a Kronecker transform are learned; use transform='kronecker'.")
        self.fixed, self.bits, self.symmetric, self.state = fixed, source.bits, source.symmetric, source.state
        self.group = source.group_size or source.in_features
        self._typed = {name: getattr(fixed, name) for name in ("keep", "left_out", "leaves_out", "uses")}
        self.left = nn.Parameter(fixed.left.clone())
        self.right = nn.Parameter(fixed.right.clone())
        scale = fixed.channel_scale
        self.log_scale = nn.Parameter(scale.log()) if scale is not None else None
        self.clip = nn.Parameter(_logit(source.clip.float()))
        self._near: dict[str, torch.Tensor] = {}  # inverses before the last step
        self._last: tuple[torch.Tensor, tuple] | None = None
        self.inverses: tuple[torch.Tensor, torch.Tensor] | None = None

    def forget(self) -> None:
        """Drop what was computed from the parameters before a step."""
        self._last = self.inverses = None

    def _inverse(self, name: str) -> torch.Tensor:
        """Inverse of a factor. A step changes it little, so on a GPU a few products find it from the one before: a
        decomposition would take more kernels, and cannot be recorded.
        """
        factor = getattr(self, name)
        if not factor.is_cuda:
            return torch.linalg.inv_ex(factor)[0]  # a singular factor yields NaN loss
        if name not in self._near:
            self._near[name] = torch.linalg.inv(factor.detach())
        return followed_inverse(factor, self._near[name])

    def current(self) -> InputMap:
        """The map with the parameters as they are now."""
        scale = None if self.log_scale is None else self.log_scale.exp()
        return InputMap(self.fixed.mean, scale, self.fixed.basis, self.left, self.right, **self._typed)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rounded z, p and types of rows `x`; computed once for the linears that share `x`."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        types = self.state.of(x) if len(self.clip) > 1 else None
        with products("highest", x.device):
            self.inverses = (self._inverse("left"), self._inverse("right"))
            z, low_rank = self.current().apply(x.float(), types)
        if self.bits < 16:
            clip = pick(torch.sigmoid(self.clip)[:, None], types)
            groups = z.unflatten(-1, (-1, self.group))  # (..., groups, group)
            qparams = choose_qparams(groups, self.bits, self.symmetric, clip.unsqueeze(-1))
            z = fake_quantize_ste(groups, qparams, self.bits).flatten(-2)
        self._last = (x, (z, low_rank, types))
        return self._last[1]


class LearnedLinear(nn.Module):
    """Differentiable twin of a quantized linear: learns the clip of each weight row."""

    def __init__(self, linear: nn.Linear, source: LearnedInput, type_bias: torch.Tensor | None, config: FreeActConfig):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().float(), persistent=False)
        self.register_buffer("type_bias", type_bias, persistent=False)
        self.__dict__["source"] = source
        self.bits, self.group = config.weight_bits, config.weight_group_size or linear.in_features
        shape = (len(self.weight), self.weight.shape[1] // self.group, 1)
        start = torch.full(shape, WEIGHT_CLIP_START[config.learned_start])
        self.clip = nn.Parameter(_logit(start).to(self.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `FreeActLinear.forward`, with gradients."""
        z, low_rank, types = self.source(x)
        with products("highest", x.device):
            v, branch = self.source.current().transform_weight(self.weight, self.source.inverses)
        if self.bits < 16:
            grouped = v.unflatten(-1, (-1, self.group))
            qparams = symmetric_qparams(grouped, self.bits, torch.sigmoid(self.clip))
            v = fake_quantize_ste(grouped, qparams, self.bits).flatten(1)
        y = z @ v.mT
        if low_rank is not None:
            y = y + low_rank @ branch.mT
        if self.type_bias is not None:
            y = y + pick(self.type_bias, types)
        return y.to(x.dtype)


def build_twins(
    block: nn.Module, groups: list[list[str]], originals: dict[str, nn.Linear], config: FreeActConfig
) -> tuple[dict[str, LearnedLinear], list[LearnedInput]]:
    """Twins of a block's filled quantized modules; not yet put in place."""
    twins, inputs = {}, []
    for group in groups:
        filled = [block.get_submodule(name) for name in group]
        source = LearnedInput(filled[0].source)
        inputs.append(source)
        for name, module in zip(group, filled, strict=True):
            twins[name] = LearnedLinear(originals[name], source, module.bias_rows(), config)
    return twins, inputs


class Target:
    """A batch's wanted block output, and how far another one is from it.

    Every token type counts by its relative error: the sink's output is thousands of times larger than the others', and
    would decide everything.

    Args:
        output (`torch.Tensor` of shape `(batch, sequence, d)`): Wanted.
        types (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Token types.
    """

    def __init__(self, output: torch.Tensor, types: torch.Tensor | None):
        self.output = output
        energy = output.float().square().mean(-1, keepdim=True)
        mean = energy.mean()
        if types is not None and types.shape == output.shape[:-1]:
            types, mean = types.to(output.device).unsqueeze(-1), torch.zeros_like(energy)
            for kind in types.unique():
                mean[types == kind] = energy[types == kind].mean()
        self.weight = 1 / mean.clamp_min(torch.finfo(torch.float32).tiny)

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        """Relative squared error, the mean over tokens."""
        return ((output.float() - self.output.float()).square() * self.weight).mean()


def map_parameters(twins: dict[str, LearnedLinear], inputs: list[LearnedInput], rate: float) -> list[dict]:
    """For the optimizer: transforms and channel scales, and clips at a rate of their own."""
    slow = [p for source in inputs for n, p in source.named_parameters() if n != "clip"]
    fast = [source.clip for source in inputs] + [twin.clip for twin in twins.values()]
    return [{"params": slow, "lr": rate}, {"params": fast, "lr": rate * CLIP_RATE}]


def learn(
    block: nn.Module,
    twins: dict[str, nn.Module],
    parameters: list[dict],
    forget: Callable[[], None],
    run: Callable[[int], torch.Tensor],
    targets: list[Target],
    config: FreeActConfig,
) -> dict[str, float]:
    """Train the twins in place of the block's linears, then take them out again.

    Args:
        block: The block; its quantized modules are back in place afterwards.
        twins: In place of the block's linears meanwhile, by name.
        parameters (`list[dict]`): What is learned, with learning rates.
        forget: Called before each step.
        run: Runs the block on batch `i` and returns its output.
        targets (`list[Target]`): Wanted outputs per batch; the last batch is held out.
        config ([`FreeActConfig`]): Epochs, learning rate, seed.

    Returns:
        Relative training loss of the first and the last epoch.
    """
    replaced = {name: block.get_submodule(name) for name in twins}
    for name, twin in twins.items():
        block.set_submodule(name, twin)
    rate = config.learning_rate
    device = targets[0].output.device
    optimizer = torch.optim.AdamW(parameters, fused=device.type == "cuda")
    changed = [p for group in parameters for p in group["params"]]
    learned = {id(p) for p in changed}
    train = list(range(max(1, len(targets) - 1)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * len(train), eta_min=rate * 1e-3)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[torch.Tensor] = []
    frozen = [p for p in block.parameters() if p.requires_grad and id(p) not in learned]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def step(i: int) -> torch.Tensor:
        forget()
        loss = targets[i].loss(run(i))
        (loss / loss.detach().clamp_min(1e-20)).backward()
        return loss.detach()

    recorded = None
    try:
        with torch.enable_grad(), products("high", device):
            recorded = record(step, changed, train, device)
            for _ in range(config.epochs):
                total = torch.zeros((), device=device)
                for i in torch.randperm(len(train), generator=generator).tolist():
                    if recorded is None:
                        optimizer.zero_grad(set_to_none=True)
                    loss = step(i) if recorded is None else recorded(i)
                    optimizer.step()
                    schedule.step()
                    total += loss
                history.append(total / len(train))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        forget()
        if recorded is not None:
            recorded.close()
        for name, module in replaced.items():
            block.set_submodule(name, module)
    return {"first_loss": float(history[0]), "last_loss": float(history[-1])}


@torch.no_grad()
def write_back(source: FreeActInput, learned: LearnedInput) -> list[float]:
    """Store a learned map in its module; returns the clips. The weights must be rounded again afterwards."""
    found = learned.current()
    for name in ("left", "right", "channel_scale"):
        value = getattr(found, name)
        if value is not None:
            getattr(source, name).copy_(value)
    return torch.sigmoid(learned.clip).tolist()
