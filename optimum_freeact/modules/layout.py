"""Where a model's quantizable linears are, and which of them read the same input.

The table holds the common families; for the rest, linears that receive the very same tensor in a forward share an
input. The result is recorded in the config, so loading needs neither.
"""

from __future__ import annotations

import torch
from torch import nn


LLAMA_LIKE = {
    "self_attn": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "mlp": [["gate_proj", "up_proj"], ["down_proj"]],
}
FUSED = {"self_attn": [["qkv_proj"], ["o_proj"]], "mlp": [["gate_up_proj"], ["down_proj"]]}

# model_type -> module inside a block -> groups of linears that read the same tensor
INPUT_GROUPS: dict[str, dict[str, list[list[str]]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "olmo2", "smollm3"),
        LLAMA_LIKE,
    ),
    "phi3": FUSED,
}


# subclasses that compute just what nn.Linear does
PLAIN_SUBCLASSES = ("FalconLinear",)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` and nothing more."""
    return type(module) is nn.Linear or type(module).__name__ in PLAIN_SUBCLASSES


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder blocks: `get_decoder()` where the model has one, else its base model."""
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else None
    if decoder is None:
        decoder = getattr(model, "base_model", model)
    return decoder


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its name in the model.

    Blocks are the longest outermost `nn.ModuleList` in the decoder whose items hold linears.

    Raises:
        `ValueError`: if there is none.
    """
    decoder = find_decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list = []
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            linears = [any(isinstance(child, nn.Linear) for child in item.modules()) for item in module]
            same = len({type(item) for item in module}) == 1  # some families have blocks of several classes
            if (linears[0] if same else all(linears)) and not any(
                inside(names[id(module)], name) for name, _ in found
            ):
                found.append((names[id(module)], module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no list of decoder blocks with nn.Linear layers inside: nothing to quantize."
        )
    return max(found, key=lambda item: len(item[1]))


def inside(name: str, parent: str) -> bool:
    """Whether module `name` lies inside module `parent`."""
    return name.startswith(parent + ".")


def is_excluded(name: str, patterns: list[str] | None) -> bool:
    """Whether a module name equals a pattern, ends with it, or lies inside it (at module boundaries)."""
    dotted = f".{name}."
    return any(f".{pattern}." in dotted for pattern in patterns or [])


def block_linears(block: nn.Module, prefix: str, excluded: list[str] | None) -> dict[str, nn.Linear]:
    """Plain linears inside a block that can be quantized, by name relative to the block."""
    return {
        name: module
        for name, module in block.named_modules()
        if is_plain_linear(module) and not is_excluded(f"{prefix}.{name}", excluded)
    }


def table_groups(model_type: str, linears: dict[str, nn.Linear]) -> list[list[str]] | None:
    """Groups (relative names) from the table, or `None` if the table does not cover exactly these linears."""
    table = INPUT_GROUPS.get(model_type)
    if table is None:
        return None
    groups = [[f"{parent}.{leaf}" for leaf in leaves] for parent, items in table.items() for leaves in items]
    groups = [[name for name in group if name in linears] for group in groups]
    covered = {name for group in groups for name in group}
    return [group for group in groups if group] if covered == set(linears) else None


class _Watched(nn.Linear):
    """What a linear is made while a block is watched: it notes whether its weight or bias is read but to call it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["_called"] = True
        try:
            return super().forward(input)
        finally:
            self.__dict__["_called"] = False

    def __getattr__(self, name: str):
        if name in ("weight", "bias") and not self.__dict__.get("_called"):
            self.__dict__["_was_read"] = True
        return super().__getattr__(name)


class SharedInputs:
    """Generic fallback: watches one forward of a block and groups the linears that got the same tensor.

    A linear whose weight or bias the model itself reads is in no group: packed codes in its place would be misread.
    """

    def __init__(self, linears: dict[str, nn.Linear]):
        self._seen: list[tuple[torch.Tensor, list[str]]] = []  # tensors are kept alive, so identity is unambiguous
        self._hooks = [module.register_forward_pre_hook(self._record(name)) for name, module in linears.items()]
        self._watched = {name: module for name, module in linears.items() if type(module) is nn.Linear}
        for module in self._watched.values():
            module.__class__ = _Watched

    def _record(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
            for tensor, names in self._seen:
                if tensor is args[0] and name.rpartition(".")[0] == names[0].rpartition(".")[0]:
                    names.append(name)
                    return
            self._seen.append((args[0], [name]))

        return hook

    def end(self) -> set[str]:
        """Make the linears what they were; names of those whose weight or bias was read."""
        for hook in self._hooks:
            hook.remove()
        for module in self._watched.values():
            module.__class__ = nn.Linear
            module.__dict__.pop("_called", None)
        return {name for name, module in self._watched.items() if module.__dict__.pop("_was_read", False)}

    def groups(self) -> list[list[str]]:
        """Groups in order of first use; a linear that was called twice stands alone. Ends the watching."""
        read = self.end()
        self._seen = [(tensor, [name for name in names if name not in read]) for tensor, names in self._seen]
        calls = [name for _, names in self._seen for name in names]
        repeated = {name for name in calls if calls.count(name) > 1}
        groups = [[name for name in names if name not in repeated] for _, names in self._seen]
        self._seen.clear()
        return [group for group in groups if group] + [[name] for name in sorted(repeated)]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unquantized_parameters(model: nn.Module, blocks_name: str, blocks: nn.ModuleList) -> dict[str, str]:
    """Parameters with two or more dimensions that stay as they are, with the reason: name -> why."""
    reasons = {}
    inner = {id(p) for p in blocks.parameters()}
    convolutions = {
        id(p): type(m).__name__
        for m in blocks.modules()
        if isinstance(m, CONVOLUTIONS)
        for p in m.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (parameter.dtype == torch.uint8 and parameter.ndim in (3, 4)):  # packed
            continue
        if id(parameter) in convolutions:
            reasons[name] = f"of a {convolutions[id(parameter)]}, not of an nn.Linear"
        elif parameter.ndim == 3 and id(parameter) in inner:
            reasons[name] = "mixture-of-experts weights are 3-D parameters, not nn.Linear"
        elif id(parameter) in inner:
            reasons[name] = "excluded, or not an nn.Linear"
        else:
            reasons[name] = f"outside the decoder blocks ({blocks_name}): embeddings, head or another tower"
    return reasons
