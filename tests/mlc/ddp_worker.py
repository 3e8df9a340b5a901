"""Train every case of `CASES` and keep the final weights; run alone or on several processes.

On several, gradients under `fully_shard` are compared afterwards: one launch, since imports cost more than the runs.

torchrun --nproc-per-node 2 -m tests.mlc.ddp_worker <model folder> <output folder>
"""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.trainer import dpo_trainer

from tests.mlc import fsdp_worker
from tests.mlc.conftest import rows
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.reference import whole_reference
from trl_mlc.sft import MLCSFTConfig, MLCSFTTrainer


TERM = {"mlc_layer": 3, "mlc_extractor_dim": 16, "mlc_every": 1, "mlc_buckets": 1}
CASES = {
    "full": {},
    "full-checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "lora-checkpointed": {"lora": True, "gradient_checkpointing": True},
    "every-second": {"mlc_every": 2, "ddp_find_unused_parameters": False},
    "subset": {"mlc_every": 2, "mlc_languages_per_step": 2, "ddp_find_unused_parameters": True},
    "centred": {"mlc_center": "language", "mlc_center_momentum": 0.5},
    "one-rank-empty": {"empty": True},
    "sft": {"method": "sft"},
}


def run_case(name: str, model: str, folder: Path, world: int) -> dict[str, torch.Tensor]:
    """Final weights of one case; four rows per optimizer step however many processes there are."""
    case = dict(CASES[name])
    method, lora, empty = case.pop("method", "dpo"), case.pop("lora", False), case.pop("empty", False)
    table = rows(n=12, missing=3)
    if empty:  # the first two rows of every four have no translations: one process has none at all
        table["prompt_translations"] = [
            dict.fromkeys(t) if i % 4 < 2 else t for i, t in enumerate(table["prompt_translations"])
        ]
    data = Dataset.from_dict(table)
    if method == "sft":
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
    trainer_class, config_class = {
        "dpo": (MLCDPOTrainer, MLCDPOConfig),
        "sft": (MLCSFTTrainer, MLCSFTConfig),
    }[method]
    options = {"gradient_checkpointing": False, **TERM, **case}
    args = config_class(
        output_dir=str(folder / f"{name}-{world}"),
        per_device_train_batch_size=4 // world,
        max_steps=3,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft)
    trainer.train()
    found = {k: v.detach().clone() for k, v in trainer.model.named_parameters() if v.requires_grad}
    losses = [e["mlc/loss"] for e in trainer.state.log_history if "mlc/loss" in e]
    return {**found, "logged": torch.tensor(losses)}


def sent_reference(rank: int) -> dict[str, torch.Tensor]:
    """A reference model as efficient loading leaves it, empty but on the first process, after it went to be sharded."""
    torch.manual_seed(rank)
    model = torch.nn.BatchNorm1d(3)  # has buffers, and one that is a whole number
    model.weight.data.normal_()
    model.running_mean.normal_()
    model.num_batches_tracked.fill_(7 - rank)
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"))
    seen = {}
    stock, dpo_trainer.prepare_fsdp = dpo_trainer.prepare_fsdp, lambda model, _: seen.update(model.state_dict())
    with whole_reference(MLCDPOTrainer):
        dpo_trainer.prepare_fsdp(model, accelerator)
    dpo_trainer.prepare_fsdp = stock
    return seen


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    gc.freeze()
    for name in CASES:
        torch.save(run_case(name, model, folder, world), folder / f"{name}-{world}-{rank}.pt")
    fsdp_worker.check(model)
    torch.save(sent_reference(rank), folder / f"reference-{rank}.pt")
    (folder / f"fully_shard-{rank}").touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
