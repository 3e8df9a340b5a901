"""A small vision-language model, put together from a vision transformer made here and a packaged language model.

It is a LLaVA in transformers' own class, trained on [`scenes`](scenes.py): as an autoregressive captioner (types: text and
image), or as a masked-diffusion one (text, image and mask).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.token_types.diffusion import descend, mask_rows
from benchmarks.token_types.scenes import HEAD, PATCH, SIDE, Scenes
from optimum_freeact.models.bidirectional import full_mask
from optimum_freeact.models.denoise import denoise, predictions
from optimum_freeact.models.llada import LladaConfig


SIGHT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}


def assemble(source: Any, image_id: int, mask_id: int | None, sight: dict) -> nn.Module:
    """A LLaVA around a language model's weights; with `mask_id` its decoder is bidirectional."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {k: v for k, v in source.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    kind = type(source.config)
    text_config = kind(**text) if mask_id is None else LladaConfig(**text, mask_token_id=mask_id, shifted_logits=True)
    config = LlavaConfig(
        text_config=text_config,
        vision_config=CLIPVisionConfig(
            **sight, image_size=SIDE, patch_size=PATCH, projection_dim=sight["hidden_size"]
        ),
        image_token_index=image_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=source.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.model.language_model.load_state_dict(source.model.state_dict())
    if not source.config.tie_word_embeddings:
        model.lm_head.load_state_dict(source.lm_head.state_dict())
    return model.float()


def text_setting(model: nn.Module, name: str) -> Any:
    """A setting of the language model inside."""
    return getattr(model.config.text_config, name, None)


def caption_places(inputs: dict) -> torch.Tensor:
    """Which tokens belong to the captions, `(batch, tokens)`."""
    places = inputs["attention_mask"].bool().clone()
    places[:, :HEAD] = False
    return places


def mask_captions(
    model: nn.Module, inputs: dict, ratio: torch.Tensor, generator: torch.Generator
) -> tuple[dict, torch.Tensor]:
    """Inputs with a share of each caption masked, and which tokens are."""
    ids = inputs["input_ids"]
    masked = mask_rows(ids, ratio, text_setting(model, "mask_token_id"), generator) & caption_places(inputs)
    return {**inputs, "input_ids": ids.masked_fill(masked, text_setting(model, "mask_token_id"))}, masked


def with_head_apart(inputs: dict, rows: torch.Tensor) -> dict:
    """Inputs of a bidirectional decoder in which start and picture of some rows do not see the caption, as when they come
    first and reach the caption through a cache.
    """
    padding = inputs["attention_mask"]
    mask = full_mask(padding, *padding.shape, 0, torch.float32, padding.device)
    apart = torch.zeros_like(mask, dtype=torch.bool)
    apart[rows, :, :HEAD, HEAD:] = True
    return {**inputs, "attention_mask": mask.masked_fill(apart, torch.finfo(mask.dtype).min)}


def on(inputs: dict, device: torch.device | str) -> dict:
    """Inputs on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}


def train(
    model: nn.Module,
    scenes: Scenes,
    *,
    steps: int,
    batch: int,
    rate: float = 2e-4,
    sight_rate: float = 1e-3,
    seed: int = 0,
    seconds: float | None = None,
    part: int | None = None,
    log: Any = print,
) -> dict:
    """Train everything in place: the vision part fast, the language model gently. As [`diffusion.train`].

    Where the decoder denoises, half of each batch sees its picture as block-wise decoding gives it: encoded before the
    caption. The model is scored both ways.
    """
    device = next(model.parameters()).device
    fast = device.type == "cuda"
    inner = {id(p) for p in [*model.model.language_model.parameters(), *model.lm_head.parameters()]}
    parts = [
        {"params": [p for p in model.parameters() if (id(p) in inner) == own], "lr": r, "base": r}
        for own, r in ((True, rate), (False, sight_rate))
    ]
    optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.98), weight_decay=0.01, fused=fast)
    generator = torch.Generator().manual_seed(seed)
    start, losses, done = time.perf_counter(), [], 0
    model.train()
    for step in range(steps):
        share = max(step / steps, 0.0 if seconds is None else (time.perf_counter() - start) / seconds)
        if share >= 1:
            break
        scale = min(1.0, (step + 1) / 40) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * scale
        inputs = scenes.inputs(scenes.draw(batch, generator))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
            loss = descend(caption_losses(model, inputs, generator, part or batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if step % 100 == 0 or step == steps - 1:
            losses.append(float(loss))
            log(f"step {step} loss {losses[-1]:.3f} {time.perf_counter() - start:.0f} s")
    model.eval()
    return {"steps": done, "seconds": time.perf_counter() - start, "loss": losses[-1]}


def caption_losses(model: nn.Module, inputs: dict, generator: torch.Generator, part: int) -> Iterator[torch.Tensor]:
    """The loss for `part` captions at a time, whose sum counts: the mean over tokens, or as [`diffusion_losses`] does."""
    device = next(model.parameters()).device
    wanted, places = inputs["input_ids"], caption_places(inputs)
    batch, length = wanted.shape
    weight = torch.full(wanted.shape, 1 / int(places.sum()))
    if text_setting(model, "mask_token_id") is not None:
        ratio = ((torch.arange(batch) / batch + torch.rand(1, generator=generator)) % 1).clamp(0.05, 1.0)
        inputs, places = mask_captions(model, inputs, ratio, generator)
        inputs = with_head_apart(inputs, torch.randperm(batch, generator=generator)[: batch // 2])
        weight = (1 / ratio / (batch * 20))[:, None].expand_as(places)
    first = HEAD - 1  # the logits before a token are its own
    for some in torch.arange(batch).split(part):
        rows, columns = places[some].nonzero(as_tuple=True)
        given = on({name: value[some] for name, value in inputs.items()}, device)
        logits = model(**given, use_cache=False, logits_to_keep=length - first).logits
        chosen = logits[rows.to(device), (columns - 1 - first).to(device)].float()
        each = nn.functional.cross_entropy(chosen, wanted[some][rows, columns].to(device), reduction="none")
        yield (each * weight[some][rows, columns].to(device)).sum()


# ---------------------------------------------------------------- scoring
@torch.no_grad()
def caption_nll(model: nn.Module, inputs: dict, use_cache: bool) -> torch.Tensor:
    """Negative log-likelihood of each caption, summed over its tokens, `(batch,)` float64 on the CPU."""
    device = next(model.parameters()).device
    keep = inputs["input_ids"].shape[1] - HEAD + 1  # the logits before a token are its own
    told = model(**on(inputs, device), use_cache=use_cache, logits_to_keep=keep).logits[:, :-1].float()
    wanted = inputs["input_ids"][:, HEAD:].to(device)
    each = nn.functional.cross_entropy(told.flatten(0, 1), wanted.flatten(), reduction="none").cpu()
    return (each.double().view(wanted.shape) * caption_places(inputs)[:, HEAD:]).sum(1)


@torch.no_grad()
def score_captions(model: nn.Module, scenes: Scenes, cells: torch.Tensor, batch: int, use_cache: bool) -> dict:
    """Mean negative log-likelihood of a caption's token (nats)."""
    total, count = 0.0, 0
    for part in cells.split(batch):
        inputs = scenes.inputs(part)
        total += float(caption_nll(model, inputs, use_cache).sum())
        count += int(caption_places(inputs).sum())
    return {"caption_nll": total / count}


@torch.no_grad()
def score_retrieval(
    model: nn.Module, scenes: Scenes, cells: torch.Tensor, n: int, batch: int, use_cache: bool
) -> dict[str, float]:
    """Share of pictures whose own caption is the likeliest a token of `n`: its own and those of the next scenes."""
    captions = [scenes.caption(row) for row in cells.tolist()]
    right = 0
    for part in torch.arange(len(cells)).split(max(1, batch // n)):
        others = [captions[(i + j) % len(cells)] for i in part.tolist() for j in range(n)]
        nll = caption_nll(model, scenes.inputs(cells[part].repeat_interleave(n, 0), others), use_cache)
        lengths = torch.tensor([len(other) for other in others])
        right += int(((nll / lengths).view(-1, n).argmin(1) == 0).sum())
    return {"retrieval_accuracy": right / len(cells)}


@torch.no_grad()
def score_written(model: nn.Module, scenes: Scenes, cells: torch.Tensor, batch: int, use_cache: bool) -> dict:
    """What is written for a picture, greedily, or by denoising places of the right number two at a time: the share of
    tokens that are those of the caption, and of captions without a fault.
    """
    device = next(model.parameters()).device
    captions = [scenes.caption(row) for row in cells.tolist()]
    lengths = [len(caption) for caption in captions]
    right, exact = 0, 0
    diffuses = text_setting(model, "mask_token_id") is not None
    groups = [[i for i, each in enumerate(lengths) if each == n] for n in sorted(set(lengths))]
    groups = groups if diffuses else [list(range(len(captions)))]
    for some in (group[start : start + batch] for group in groups for start in range(0, len(group), batch)):
        inputs = on(scenes.inputs(cells[some], [[] for _ in some]), device)
        length = max(lengths[i] for i in some)
        if diffuses:
            steps, pixels = math.ceil(length / 2), inputs["pixel_values"]
            made = denoise(model, inputs["input_ids"], length, steps, use_cache=use_cache, pixel_values=pixels)
        else:
            end = {"eos_token_id": scenes.end_id, "pad_token_id": scenes.end_id, "suppress_tokens": [scenes.image_id]}
            made = model.generate(**inputs, max_new_tokens=length, do_sample=False, use_cache=True, **end)
        for row, i in zip(made[:, HEAD:].tolist(), some, strict=True):
            row = (row + [scenes.end_id] * length)[: lengths[i]]
            right += sum(a == b for a, b in zip(row, captions[i], strict=True))
            exact += row == captions[i]
    return {"caption_accuracy": right / sum(lengths), "exact_match": exact / len(cells)}


@torch.no_grad()
def score_masked(
    model: nn.Module, scenes: Scenes, cells: torch.Tensor, ratio: float, batch: int, use_cache: bool
) -> dict:
    """As [`diffusion.score_masked`], at the captions' masked tokens; the cache holds start and picture."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    nll, right, count = 0.0, 0, 0
    for part in cells.split(batch):
        plain = scenes.inputs(part)
        inputs, masked = mask_captions(model, plain, torch.full((len(part),), ratio), generator)
        inputs = on(inputs, device)
        if use_cache:
            head = {name: value[:, :HEAD] for name, value in inputs.items() if name != "pixel_values"}
            told = model(**head, pixel_values=inputs["pixel_values"], use_cache=True)
            before, cache = told.logits[:, -1:], told.past_key_values
            rest = {"input_ids": inputs["input_ids"][:, HEAD:], "attention_mask": inputs["attention_mask"]}
            logits = predictions(model(**rest, past_key_values=cache, use_cache=True).logits, before, True)
        else:
            keep = inputs["input_ids"].shape[1] - HEAD + 1
            logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        places = masked[:, HEAD:]
        chosen, wanted = logits[places.to(device)].float(), plain["input_ids"][:, HEAD:][places].to(device)
        nll += float(nn.functional.cross_entropy(chosen, wanted, reduction="sum"))
        right += int((chosen.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"masked_nll": nll / count, "masked_accuracy": right / count}
