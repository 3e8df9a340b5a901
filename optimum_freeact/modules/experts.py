"""`FreeActExperts`: the experts of a mixture, which transformers keeps as three-dimensional parameters, in few bits.

All experts of a block share one input side for their first product (gate and up) and one for their second (down): what a
token brings does not depend on the expert that reads it. Each expert's weights are those of a [`FreeActLinear`] over parts
of the stacked tensors. Tokens are grouped by expert, and each group runs as a linear does, by whatever kernel serves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn, SupportsIndex

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.manners import PICKLE_REFUSED, deepcopy_module, keep_dtypes
from optimum_freeact.type_state import TypeState


PARTS = ("qscale", "weight_group_scale", "type_bias", "type_shift", "type_shift_scale", "low_rank", "low_rank_scale")
SECOND = "down_proj"


def first_name(module: nn.Module) -> str:
    """Name of the parameter of the first product."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def experts_obstacle(module: nn.Module) -> str | None:
    """Why the experts of a module with three-dimensional parameters are not quantized, or `None`."""
    names = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if names != {first_name(module), SECOND}:
        return f"its parameters {sorted(names)} are not those of one gated and one second product"
    if not hasattr(module, "num_experts") or not hasattr(module, "is_transposed"):
        return "it does not say how its experts lie in memory (transformers' use_experts_implementation does)"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output"
    if any(True for child in module.children() if list(child.parameters())):
        return "it has parameters of its own inside"
    return None


def find_experts(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of a block that hold experts which can be quantized, by name."""
    found = {}
    for name, module in block.named_modules():
        has = any(p.ndim == 3 and p.dtype != torch.uint8 for p in module.parameters(recurse=False))
        if has and experts_obstacle(module) is None:
            found[name] = module
    return found


def plain_weights(module: nn.Module, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight `(out, in)` and bias `(out,)` of both products of one expert of a plain module."""
    for name in (first_name(module), SECOND):
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        yield weight.mT if module.is_transposed else weight, None if bias is None else bias[expert]


def stand_ins(name: str, module: nn.Module) -> dict[str, nn.Linear]:
    """Linears on the meta device of the sizes of one expert's, for checks of shapes."""
    pairs = zip((first_name(module), SECOND), plain_weights(module, 0))
    return {
        f"{name}.{leaf}": nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        for leaf, (weight, _) in pairs
    }


class FreeActExperts(nn.Module):
    """Quantized experts in the place of a plain module of them.

    For each product, `gate_up_proj` (or `up_proj`) and `down_proj`, it stores

    - under the product's own name the packed codes, `uint8`, `(experts, out, groups, bytes)`: with four dimensions and of
      this type no program without this package takes them for weights;
    - `<name>_qscale`, `<name>_weight_group_scale`, `<name>_type_bias`, `<name>_type_shift`, `<name>_type_shift_scale`, `<name>_low_rank`,
      `<name>_low_rank_scale`: as [`FreeActLinear`] has them, stacked over experts;
    - `<name>_input`: the shared [`FreeActInput`].

    Args:
        plain (`nn.Module`): The module of transformers. Its parameters are taken away; its gate is still used.
        config ([`FreeActConfig`]): Settings.
        state ([`TypeState`]): Where the current types are found.
        rank (callable): Rank of the branch for a width and the heights of the weights that read it.
    """

    def __init__(self, plain: nn.Module, config: FreeActConfig, state: TypeState, rank):
        super().__init__()
        self.num_experts, self.state, self._is_hf_initialized = plain.num_experts, state, True
        first, second = getattr(plain, first_name(plain)), plain.down_proj
        if plain.is_transposed:
            first, second = first.mT, second.mT
        self.names = (first_name(plain), SECOND)
        self.shapes = (tuple(first.shape[1:]), tuple(second.shape[1:]))
        self.bits = config.weight_bits
        self.weight_dtype = getattr(torch, config.weight_dtype or "float32")
        self.has_bias = hasattr(plain, f"{SECOND}_bias")
        self.groups = tuple(d if self.bits == 16 else config.weight_group_size or d for _, d in self.shapes)
        self.plain_dtype = first.dtype
        means = {"none": 0, "shared": 1, "per_type": config.n_types}[config.centring]
        for name, (m, d), group in zip(self.names, self.shapes, self.groups):
            source = FreeActInput(
                d, n_types=config.n_types, n_means=means, channel_scale=config.channel_scale != "none", rank=rank(d, [m] * self.num_experts),
                transform=config.transform, bits=config.activation_bits, symmetric=config.activation_symmetric,
                group_size=config.activation_group_size, n_readers=1, state=state,
            )  # fmt: skip
            source.reader_settings = [(self.bits, None if group == d else group)]
            self.add_module(f"{name}_input", source)
            like = self._linear(d, m, source, group)
            self.register_parameter(name, _stacked(like.weight, self.num_experts))
            for part in PARTS:
                tensor = getattr(like, part)
                stacked = None if tensor is None else _stacked(tensor, self.num_experts).data
                self.register_buffer(f"{name}_{part}", stacked)
        for parameter in [name for name, _ in plain.named_parameters(recurse=False)]:
            delattr(plain, parameter)
        self.__dict__["plain"] = plain  # its gate, and what it turns back into
        self._linears: tuple[list[FreeActLinear], list[FreeActLinear]] | None = None

    def _linear(self, d: int, m: int, source: FreeActInput, group: int) -> FreeActLinear:
        settings, readers = source.reader_settings, source.readers
        source.reader_settings, source.readers = [], []
        with torch.device("meta"):
            made = FreeActLinear(
                d, m, source, bits=self.bits, group_size=group, bias=self.has_bias, dtype=self.weight_dtype
            )
        source.reader_settings, source.readers = settings, readers
        return made

    def linears(self) -> tuple[list[FreeActLinear], list[FreeActLinear]]:
        """Both products of all experts, as linears over parts of the stacked tensors."""
        made = []
        for name, (m, d), group in zip(self.names, self.shapes, self.groups):
            source, weight = getattr(self, f"{name}_input"), getattr(self, name)
            parts = {part: getattr(self, f"{name}_{part}") for part in PARTS}
            ours = []
            for expert in range(self.num_experts):
                linear = self._linear(d, m, source, group)
                linear.weight = nn.Parameter(weight.data[expert], requires_grad=False)
                for part, tensor in parts.items():
                    linear._buffers[part] = None if tensor is None else tensor[expert]
                ours.append(linear)
            made.append(ours)
        return made[0], made[1]

    def prepare(self) -> None:
        """Make what the products on this device need."""
        self._linears = None
        if getattr(self, self.names[0]).device.type == "meta":
            return
        self._linears = self.linears()
        for linear in (*self._linears[0], *self._linears[1]):
            linear.prepare()

    def gate(self, first: torch.Tensor) -> torch.Tensor:
        """What lies between the two products."""
        return self.plain._apply_gate(first) if getattr(self.plain, "has_gate", True) else self.plain.act_fn(first)

    @torch.compiler.disable
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As transformers' experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(tokens, hidden)`): Of all tokens.
            top_k_index (`torch.Tensor` of shape `(tokens, k)`): Experts of each; `num_experts` stands for none.
            top_k_weights (`torch.Tensor` of shape `(tokens, k)`): Their weights.

        Returns:
            `torch.Tensor` of shape `(tokens, hidden)`.
        """
        firsts, seconds = self._linears or self.linears()
        types = self.state.of(hidden_states)
        outer = self.state.types
        result = torch.zeros(hidden_states.shape, dtype=torch.promote_types(hidden_states.dtype, torch.float32),
                             device=hidden_states.device)  # fmt: skip
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        tokens, weights = order // top_k_index.shape[1], top_k_weights.reshape(-1)[order]
        counts = torch.bincount(experts, minlength=self.num_experts + 1).tolist()
        try:
            end = 0
            for expert, count in enumerate(counts[: self.num_experts]):
                start, end = end, end + count
                if count == 0:
                    continue
                rows = tokens[start:end]
                self.state.types = None if types is None else types.reshape(-1)[rows]
                y = seconds[expert](self.gate(firsts[expert](hidden_states[rows])))
                result = result.index_add(0, rows, y.to(result.dtype) * weights[start:end, None].to(result.dtype))
        finally:
            self.state.types = outer
        return result.to(hidden_states.dtype)

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, without those of the inputs."""
        found = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def restored(self, weights, dtype: torch.dtype) -> nn.Module:
        """The plain module again; `weights` gives weight and bias of a linear's plain form."""
        plain, pairs = self.plain, self._linears or self.linears()
        for name, linears in zip(self.names, pairs, strict=True):
            found = [weights(linear) for linear in linears]
            stacked = torch.stack([weight for weight, _ in found]).to(dtype)
            stacked = stacked.mT.contiguous() if plain.is_transposed else stacked
            setattr(plain, name, nn.Parameter(stacked))
            if self.has_bias:
                setattr(plain, f"{name}_bias", nn.Parameter(torch.stack([bias for _, bias in found]).to(dtype)))
        return plain

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._linears is not None:
            self.prepare()

    def _apply(self, fn, recurse: bool = True) -> FreeActExperts:
        prepared, self._linears = self._linears is not None, None
        result = keep_dtypes(self, super()._apply, fn, recurse)
        if prepared:
            self.prepare()
        return result

    def __deepcopy__(self, memo: dict) -> FreeActExperts:
        prepared, self._linears = self._linears, None
        clone = deepcopy_module(self, memo)
        self._linears = prepared
        if prepared is not None:
            clone.prepare()
        return clone

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # noqa: ARG002
        raise TypeError(PICKLE_REFUSED.format(type(self).__name__))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.num_experts} experts of {self.shapes[0]} and {self.shapes[1]}, bits={self.bits}"


def _stacked(tensor: torch.Tensor, n: int) -> nn.Parameter:
    """Room for `n` tensors like one, with the values that empty modules have."""
    device = torch.get_default_device()
    if tensor.dtype == torch.uint8:
        made = torch.zeros(n, *tensor.shape, dtype=tensor.dtype, device=device)
    else:
        made = torch.ones(n, *tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(made, requires_grad=False)
