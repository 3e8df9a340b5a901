"""Words with a learning rate of their own.

What a word of another language means is learned in its row of the embedding, faster than the layers may go without harm to
what a model knows. In most small models the output head *is* the embedding: then every step of a softmax moves every row,
and at such a rate ruins them. So the head gets a copy of its own, which is not trained.
"""

from __future__ import annotations

import torch
from torch import nn


def untie_head(model: nn.Module) -> None:
    """Give a model whose head is its embedding a head of its own, as it is now, which is not trained.

    Args:
        model (`nn.Module`): a transformers model; unchanged if its head is no part of the embedding.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    tied = getattr(model, "all_tied_weights_keys", {})
    kept = {name: source for name, source in tied.items() if model.get_parameter(name) is not head.weight}
    model.all_tied_weights_keys = kept


def set_embedding_lr(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Move the input embedding into a parameter group with this learning rate.

    Raises:
        `ValueError`: if the optimizer does not train it.
    """
    words = model.get_input_embeddings().weight
    for group in optimizer.param_groups:
        if any(p is words for p in group["params"]):
            group["params"] = [p for p in group["params"] if p is not words]
            own = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            optimizer.add_param_group({"params": [words], "lr": rate, **own})
            return
    raise ValueError(
        "The input embedding is not trained, so it can have no learning rate of its own. Train all weights (no adapter), or "
        "leave mlc_embedding_lr away."
    )
