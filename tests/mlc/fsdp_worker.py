"""Gradients of the term under torch's `fully_shard` against the unsharded model; called on several processes."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from trl_mlc.collator import collate_prompts, to_groups
from trl_mlc.extractor import Extractor
from trl_mlc.losses import consistency_loss
from trl_mlc.prompt_pass import PromptPass


def prompts_of(rank: int) -> dict:
    draw = torch.Generator().manual_seed(rank)
    rows = []
    for _ in range(2):
        ids = [
            torch.randint(5, 200, (int(n),), generator=draw).tolist()
            for n in torch.randint(2, 9, (3,), generator=draw)
        ]
        rows.append({"mlc_input_ids": ids, "mlc_language_ids": [0, 1, 2]})
    return collate_prompts(rows, 0)


def build(folder: str, checkpointing: bool):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, PromptPass(model, Extractor(32, 16), layer=3, pooling="last", buckets=1)


def loss_of(model, prompt_pass: PromptPass, rank: int, skip: bool) -> torch.Tensor:
    """A main loss and the term; `skip` asks for no prompts, as on steps without the term."""
    prompts = prompts_of(rank)
    prompt_pass.request(None if skip else prompts)
    ids = torch.arange(10).view(2, 5) + 7 * rank
    loss = model(input_ids=ids, labels=ids).loss
    states = prompt_pass.take()
    if skip:
        return loss + states.representations.sum()
    return loss + consistency_loss(*to_groups(states.representations, prompts)).loss


def check(folder: str) -> None:
    """Compare every gradient, with and without checkpointing, on steps with the term and without; raises if one differs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for checkpointing in (False, True):
        for skip in (False, True):
            whole, whole_pass = build(folder, checkpointing)
            sum(loss_of(whole, whole_pass, r, skip) / world for r in range(world)).backward()
            model, prompt_pass = build(folder, checkpointing)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            loss_of(model, prompt_pass, rank, skip).backward()
            expected = dict(whole.named_parameters())
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor), name
                found = parameter.grad.full_tensor()
                assert torch.allclose(found, expected[name].grad, rtol=1e-4, atol=1e-6), (name, checkpointing, skip)
