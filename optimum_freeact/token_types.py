"""Who is what: the type of every token of the current forward, known to every quantized linear.

Type 0 is ordinary text and the default wherever nothing else is known. The attention sink is the first real token of
each sequence: it carries massive activations, and every later token attends to it, so its statistics must not be
mixed with the others'. Further types (masked tokens, images, ...) are told apart by rules (type_rules.py).

How a typer is asked in each forward: `type_hooks.py`.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

import torch

from optimum_freeact.cache_name import cache_in
from optimum_freeact.type_rules import SINK, TEXT, check_names
from optimum_freeact.type_state import Seen


def _past_length(arguments: dict[str, Any]) -> int | torch.Tensor:
    cache = cache_in(arguments)
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # recurrent states alone: there is a past, or there is none
        return int(bool(cache.has_previous_state()))


def _seen_by_the_last(masks: dict, length: int, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens so far are real, `(batch, tokens)`, from masks made for attention: what the last token sees of all."""
    full, past = masks.get("full_attention"), _past_length(arguments)
    if not isinstance(full, torch.Tensor) or full.ndim != 4 or not isinstance(past, int):
        return None
    last = full[:, 0, -1, : past + length]
    return last if last.dtype == torch.bool else last == 0


def _text_positions(positions: Any) -> torch.Tensor | None:
    """Positions in the text, `(batch or 1, tokens)`. Where tokens have places in pictures, too (Qwen-VL and its kin), packed
    sequences come with four rows of positions, the first of which is the text's.
    """
    if not isinstance(positions, torch.Tensor):
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]
    return positions if positions.ndim == 2 else None


def sink_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Which of the current tokens are the first real token of their sequence.

    Correct for left and right padding (through a 2-D `attention_mask`), packed sequences (through `position_ids` that
    start again at 0, with or without a mask), and cached decoding (no new token is first).

    Args:
        arguments (`dict`): The decoder's keyword arguments: `input_ids` or `inputs_embeds`, and where present
            `attention_mask`, `position_ids`, the cache.

    Returns:
        `torch.Tensor` (`bool`) of shape `(batch, sequence)`, or `None` when neither ids nor embeddings are given.
    """
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if given is None:
        return None
    batch, length = given.shape[:2]
    mask = arguments.get("attention_mask")
    mask = _seen_by_the_last(mask, length, arguments) if isinstance(mask, dict) else mask
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[-1] >= length else None
    positions = _text_positions(arguments.get("position_ids"))
    restarts = None if positions is None else (positions == 0).expand(batch, length)
    if mask is not None:
        real = mask != 0
        first = ((real.cumsum(-1) == 1) & real)[:, -length:]
        return first if restarts is None else first | (restarts & real[:, -length:])
    if restarts is not None:
        return restarts
    index = torch.arange(length, device=given.device) + _past_length(arguments)
    return (index == 0).expand(batch, length)


def tokens_of(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Ids or embeddings of the current tokens."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def rule_hits(rule: dict, arguments: dict[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    """Which tokens a rule names, `(batch, sequence)` bool; `None` if its ids and columns are not among the arguments."""
    hits = None
    ids = arguments.get("input_ids")
    if ids is not None and "ids" in rule:
        for token in rule["ids"]:
            hits = ids == token if hits is None else hits | (ids == token)
    column = arguments.get(rule.get("column", ""))
    if isinstance(column, torch.Tensor) and column.ndim == 2 and column.shape[1] >= shape[1]:
        column = column[:, -shape[1] :]  # with a cache some models are told about all tokens, not only the new ones
        for value in rule["values"]:
            hits = column == value if hits is None else hits | (column == value)
    return hits


class TokenTyper:
    """Types from a model's arguments.

    Args:
        names (`list[str]`): Names of the types; index = type. `"text"` must be first.
        rules (`dict[str, dict]`, *optional*): How the types beside `"text"` and `"sink"` are known; see type_rules.py.
        table (`str`, *optional*): Cluster of every id, for rules that name one: a config's `cluster_table`.
        call (*optional*): A callable that gets the arguments of a forward as a dictionary and returns the types,
            integers of shape `(batch, sequence)`; the sink is found without it.
    """

    def __init__(
        self,
        names: list[str],
        rules: dict[str, dict] | None = None,
        call: Callable | None = None,
        table: str | None = None,
    ):
        self.names = check_names(names, rules, call is not None)
        self.rules = {self.names.index(name): rule for name, rule in (rules or {}).items()}
        self.call = call
        self._by_id = None if table is None else self._read_table(table)
        unruled = [name for kind, name in enumerate(names) if name not in (TEXT, SINK) and kind not in self.rules]
        if unruled and call is None:
            raise ValueError(f"token_types has {unruled}, but nothing says which tokens these are: pass type_rules.")

    def _read_table(self, table: str) -> torch.Tensor:
        """Type of every id; ids of the first cluster, and beyond the table, are text."""
        try:
            clusters = torch.tensor(list(zlib.decompress(base64.b64decode(table))), dtype=torch.long)
        except (TypeError, ValueError, zlib.error) as error:
            raise ValueError(
                f"cluster_table is no table of clusters ({error}): the config was changed or damaged after saving."
            ) from error
        kinds = torch.zeros(256, dtype=torch.long)
        for kind, rule in self.rules.items():
            if "cluster" in rule:
                kinds[rule["cluster"]] = kind
        return torch.cat((kinds[clusters], torch.zeros(1, dtype=torch.long)))

    @property
    def asks(self) -> bool:
        """Whether ids, columns or a callable decide about any type."""
        return self.call is not None or any("module" not in rule for rule in self.rules.values())

    def marks(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """Types by rules, without the sink, `int64` of shape `(batch, sequence)`; `None` if the arguments say nothing."""
        tokens = tokens_of(arguments)
        if tokens is None:
            return None
        shape = tuple(tokens.shape[:2])
        if self.call is not None:
            return self._checked(self.call(arguments), shape).to(tokens.device)
        found, ids = None, arguments.get("input_ids")
        if self._by_id is not None and ids is not None:
            if self._by_id.device != ids.device:
                self._by_id = self._by_id.to(ids.device)
            found = self._by_id[ids.clamp(max=len(self._by_id) - 1)]
        for kind, rule in self.rules.items():
            hits = rule_hits(rule, arguments, shape)
            if hits is not None:
                before = hits.new_zeros(shape, dtype=torch.long) if found is None else found
                found = torch.where(hits, kind, before)
        return found

    def _checked(self, types: Any, shape: tuple[int, int]) -> torch.Tensor:
        """A callable's or the user's answer as `int64`.

        Raises:
            `ValueError`: if it is no integer tensor of that shape, or has a type out of range.
        """
        fits = isinstance(types, torch.Tensor) and not types.is_floating_point() and tuple(types.shape) == shape
        if not fits:
            got = f"{types.dtype} of {tuple(types.shape)}" if isinstance(types, torch.Tensor) else type(types).__name__
            raise ValueError(
                f"Token types must be an integer tensor of shape {shape}, one for each token; the typer gave {got}."
            )
        if not torch.compiler.is_compiling() and types.numel():
            low, high = int(types.min()), int(types.max())
            if low < 0 or high >= len(self.names):
                raise ValueError(
                    f"Token types must lie in 0..{len(self.names) - 1} ({', '.join(self.names)}); the typer gave {low}..{high}."
                )
        return types.long()

    def see(self, arguments: dict[str, Any]) -> Seen:
        """What arguments tell."""
        return Seen(self.marks(arguments), sink_mask(arguments) if SINK in self.names else None)

    def __call__(
        self, arguments: dict[str, Any], seen: Seen | None = None, given: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Types of shape `(batch, sequence)`, `int64`, or `None` when there is only one type or nothing is known.

        Args:
            arguments (`dict`): Of the decoder's forward.
            seen ([`Seen`], *optional*): What a module around the decoder saw.
            given (`torch.Tensor`, *optional*): The user's own types.

        Raises:
            `ValueError`: if the types need ids and there are only embeddings.
        """
        tokens = tokens_of(arguments)
        if len(self.names) == 1 or tokens is None:
            return None
        shape = tuple(tokens.shape[:2])
        own = self.see(arguments)
        marks, first = own
        if seen is not None and seen.first is not None and tuple(seen.first.shape) == shape:
            first = seen.first  # it saw the plain 2-D mask; what the decoder gets may be made for attention
        if given is not None:
            marks = self._checked(given, shape).to(tokens.device)
        elif marks is None and seen is not None and seen.marks is not None and tuple(seen.marks.shape) == shape:
            marks = seen.marks
        if marks is None and self.asks:
            names = [name for name in self.names if name not in (TEXT, SINK)]
            raise ValueError(
                f"The token types {names} of this model are told by input_ids, but it was called with embeddings of shape "
                f"{tuple(tokens.shape)} alone: pass input_ids, or say the types with "
                f"`with optimum_freeact.given_types(model, types): ...`, integers of shape {shape} that count {self.names}."
            )
        if first is None:
            return marks
        sink = self.names.index(SINK)
        return first.long() * sink if marks is None else torch.where(first, sink, marks)
