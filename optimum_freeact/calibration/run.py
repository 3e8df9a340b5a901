"""From a loaded model and its config to a quantized model: data, typing hook, calibration loop, record."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import nn

from optimum_freeact.calibration.blockwise import calibrate
from optimum_freeact.calibration.canvas import check_canvas, one_chain, with_noise
from optimum_freeact.calibration.checks import check_model
from optimum_freeact.calibration.data import load_samples
from optimum_freeact.calibration.discover import add_discovered
from optimum_freeact.calibration.masking import mask_if_needed
from optimum_freeact.calibration.pictured import is_pictured
from optimum_freeact.calibration.prepared import batches, is_prepared, size_of
from optimum_freeact.calibration.ranks import Ranks
from optimum_freeact.config import LOUDNESS_LIMIT, FreeActConfig
from optimum_freeact.modules.embeddings import find_embeddings, replace_embeddings
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.kv_buffers import CacheMeanBuffers
from optimum_freeact.modules.kv_means import cache_means
from optimum_freeact.modules.layout import find_blocks, find_decoder, is_plain_linear, unquantized_parameters
from optimum_freeact.modules.twins import find_encoder, find_reader, tie_quantized
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_hooks import install_typing
from optimum_freeact.type_rules import known_rules, resolve
from optimum_freeact.type_state import attach_state


logger = logging.getLogger(__name__)


def find_tokenizer(model: nn.Module, config: FreeActConfig, pictured: bool = False) -> Any:
    """The config's tokenizer, or the one saved beside the model (its processor for data that is `pictured`); `None` if there is none."""
    if config.tokenizer is not None and not isinstance(config.tokenizer, str):
        return config.tokenizer
    from transformers import AutoProcessor, AutoTokenizer

    name = config.tokenizer or getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    try:
        return (AutoProcessor if pictured else AutoTokenizer).from_pretrained(name)
    except (OSError, ValueError) as error:
        logger.warning("No tokenizer found at %r (%s); pass FreeActConfig(tokenizer=...).", name, error)
        return None


CACHE_SAMPLES, CACHE_TOKENS = 8, 512  # a few thousand tokens fix a mean; the full-precision model runs where it is


def measure_cache(model: nn.Module, config: FreeActConfig, samples: torch.Tensor) -> None:
    """Measure the means of keys and values in the full-precision model and store them in its decoder.

    Where tokens inside a sequence are loud, values keep their zero: those tokens are what others attend to most, with values near
    zero, which a mean would only move away from it.
    """
    few = samples[:CACHE_SAMPLES, :CACHE_TOKENS] if isinstance(samples, torch.Tensor) else samples[:CACHE_SAMPLES]
    means = cache_means(model, batches(few, 1), sink_tokens=int("sink" in config.token_types), limit=config.loudest)
    config.cache_shapes = [[] if key is None else list(key.shape) for key in means.key_mean]
    buffers = CacheMeanBuffers(config.cache_shapes)
    values = means.value_mean
    if config.loudest is not None:
        values = [None if value is None else torch.zeros_like(value) for value in values]
    buffers.fill(means.key_mean, values)
    find_decoder(model).add_module(CACHE_NAME, buffers)


def run_calibration(model: nn.Module, config: FreeActConfig, data: torch.Tensor | list | None = None) -> list:
    """Calibrate and replace all blocks; the records go to `config.calibration_record`.

    Args:
        model: A decoder in full precision; changed in place.
        config ([`FreeActConfig`]): Settings; what was recorded is filled in.
        data (*optional*): The config's dataset as `read_data` returns it, if it was read already.
    """
    check_model(model, config)
    if config.embedding_bits == 8:
        find_embeddings(model)  # refused before anything is changed
    resolve_types(model, config)
    samples = make_samples(model, config, config.dataset if data is None else data)
    if config.discovered_types:
        add_discovered(model, samples, config)
    prefix, blocks = find_blocks(model)
    linear = next(m for m in blocks.modules() if is_plain_linear(m))
    config.weight_dtype = str(linear.weight.dtype).removeprefix("torch.")
    device = find_device(config)
    if config.embedding_bits == 8:
        replace_embeddings(model)  # first: blocks are calibrated on what reaches them
    start = time.perf_counter()
    records = calibrate_typed(model, config, samples, device)
    tie_quantized(model)
    n_samples, seq_len = size_of(samples)
    config.calibration_record = {
        "n_samples": n_samples,
        "seq_len": seq_len,
        "seconds": round(time.perf_counter() - start, 2),
        "output_error": [round(record.output_error, 6) for record in records],
    }
    model.__dict__["_freeact_records"] = records
    tell_kept(unquantized_parameters(model, prefix, find_blocks(model)[1]))
    return records


def resolve_types(model: nn.Module, config: FreeActConfig) -> None:
    """Fill in the token types and their rules, and what their presence says of loud tokens."""
    vocab_size = model.get_input_embeddings().num_embeddings
    config.token_types, config.type_rules = resolve(
        model, config.token_types, config.type_rules, config.typer, vocab_size
    )
    if config.loudness_limit == "auto" and known_rules(model):
        config.loudness_limit = LOUDNESS_LIMIT  # such tokens are there, also where no type is made of them


def make_samples(model: nn.Module, config: FreeActConfig, data: torch.Tensor | list) -> torch.Tensor | list:
    """Token ids or prepared inputs of the data, masked or with noise as a diffusion model meets them."""
    is_ids = isinstance(data, torch.Tensor) or is_prepared(data)
    samples = load_samples(
        data,
        None if is_ids else find_tokenizer(model, config, is_pictured(data)),
        config.n_samples,
        config.seq_len,
        config.seed,
        model.get_input_embeddings().num_embeddings,
    )
    if find_encoder(model) is not None:
        check_canvas(model, config, samples)
        return with_noise(model, samples, config.seed)
    if isinstance(samples, torch.Tensor):
        return mask_if_needed(samples, config.type_rules, config.seed)
    return samples


def find_device(config: FreeActConfig) -> torch.device:
    """Where blocks are calibrated: this process's own device where several share the work, else the config's, else the GPU if there
    is one.
    """
    ranks = Ranks(config)
    if ranks.device is not None:
        return ranks.device
    if config.calibration_device is not None:
        return torch.device(config.calibration_device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def calibrate_typed(
    model: nn.Module, config: FreeActConfig, samples: torch.Tensor | list, device: torch.device
) -> list:
    """The calibration loop with the types of each batch known to all that reads them."""
    state = attach_state(model)
    typer = TokenTyper(config.token_types, config.type_rules, config.typer, config.cluster_table)
    handles = install_typing(model, find_reader(model), typer, state)
    try:
        if config.kv_rotation is None:
            config.kv_rotation = config.transform != "none"
        if config.kv_bits < 16 and config.centring != "none":
            measure_cache(model, config, samples)
        with one_chain(model, samples, typer, state):
            return list(calibrate(model, config, samples, state, device))
    finally:
        for handle in handles:
            handle.remove()
        state.types = None


def tell_kept(kept: dict[str, str]) -> None:
    """Log which parameters stay as they are and why; experts that stay are worth a warning, for most of a model may be in them."""
    for name, reason in kept.items():
        logger.info("%s stays as it is: %s.", name, reason)
    experts = [name for name, reason in kept.items() if "experts" in reason]
    if experts:
        logger.warning(
            "%d mixture-of-experts tensors (%s, ...) are of a kind that is not quantized, or are excluded: they stay in full "
            "precision.",
            len(experts),
            experts[0],
        )
