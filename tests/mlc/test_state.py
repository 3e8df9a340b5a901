"""Stop, save, resume: nothing lost, nothing in the wrong place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.mlc.test_trainers import TERM, columns_for, digest, train
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.sft import MLCSFTConfig, MLCSFTTrainer


SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 10}
VARIANTS = {
    "full": {},
    "lora": {"lora": True},
    "own-lr": {"mlc_extractor_lr": 3e-3},
    "centred": {"mlc_center": "language", "mlc_center_momentum": 0.5},
    "languages": {"mlc_languages_per_step": 2, "mlc_every": 2},
    "auto": {"mlc_layer": "auto", "mlc_scan_prompts": 8},
}


def extractor(trainer):
    return {k: v.clone() for k, v in trainer._mlc_pass.extractor.state_dict().items()}


RUNS = [*(("dpo", variant) for variant in VARIANTS), ("sft", "full"), ("sft", "lora")]


@pytest.mark.parametrize(("method", "variant"), RUNS)
def test_resume_is_bit_identical_in_the_middle_of_an_epoch(method, variant, tiny, tokenizer, preferences, options):
    extra = {**TERM, **VARIANTS[variant]}
    options = {**options, **SAVING, "max_steps": 4, "gradient_accumulation_steps": 2}
    data = preferences(n=14, missing=5)  # 7 batches an epoch: the fourth step's accumulation is cut by its end
    whole = train(method, tiny, tokenizer, data, options, **extra)
    lora = extra.pop("lora", False)
    from peft import LoraConfig

    ours, config = {"dpo": (MLCDPOTrainer, MLCDPOConfig), "sft": (MLCSFTTrainer, MLCSFTConfig)}[method]
    resumed = ours(
        tiny,
        args=config(**options, **extra),
        train_dataset=columns_for(method, data),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    resumed.train(resume_from_checkpoint=str(Path(options["output_dir"]) / "checkpoint-2"))
    assert digest(resumed) == digest(whole)
    for name, value in extractor(whole).items():
        assert torch.equal(value, extractor(resumed)[name]), name
    if whole._mlc_means is not None:
        assert torch.equal(whole._mlc_means.means, resumed._mlc_means.means)


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoint_holds_no_extractor_and_loads_as_usual(lora, tiny, tokenizer, preferences, options):
    trainer = train("dpo", tiny, tokenizer, preferences(), {**options, **SAVING}, lora=lora, **TERM)
    folder = Path(options["output_dir"]) / "checkpoint-2"
    weights = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert not [name for name in weights if "mlc" in name]
    assert set(load_file(folder / "mlc_state.safetensors")) == {"extractor.proj.weight", "extractor.proj.bias"}
    trainer.model.save_pretrained(folder / "by-hand")
    saved = [load_file(path) for path in (folder / "by-hand").glob("*.safetensors")]
    assert not [name for part in saved for name in part if "mlc" in name]
    if not lora:
        trainer.save_model(folder / "again")
        plain = AutoModelForCausalLM.from_pretrained(folder / "again")
        for name, value in plain.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name])


def test_gathered_tensors_are_saved_instead_of_the_modules_own(tiny, tokenizer, preferences, options, tmp_path):
    trainer = train("dpo", tiny, tokenizer, preferences(), {**options, "max_steps": 1}, **TERM)
    whole = {k: v + 1 if "mlc_extractor" in k else v for k, v in trainer.model.state_dict().items()}
    trainer._save(str(tmp_path / "gathered"), state_dict=whole)  # as an engine that shards calls it
    saved = load_file(tmp_path / "gathered" / "mlc_state.safetensors")
    for name, value in extractor(trainer).items():
        assert torch.equal(saved[f"extractor.{name}"], value + 1)
    assert not [k for k in load_file(tmp_path / "gathered" / "model.safetensors") if "mlc" in k]


def test_merged_model_saves_without_extractor(tiny, tokenizer, preferences, options, tmp_path):
    trainer = train("dpo", tiny, tokenizer, preferences(), options, lora=True, **TERM)
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if "mlc" in name]


def test_best_model_brings_its_extractor(tiny, tokenizer, preferences, options):
    options |= SAVING | {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": False}  # so an early one wins
    trainer = train("dpo", tiny, tokenizer, preferences(), options, eval_data=preferences(n=4), **TERM)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    saved = load_file(best / "mlc_state.safetensors")
    for name, value in extractor(trainer).items():
        assert torch.equal(value, saved[f"extractor.{name}"])


def test_resuming_from_a_stock_checkpoint_is_refused(tiny, tokenizer, preferences, options):
    train("dpo", tiny, tokenizer, preferences(), {**options, **SAVING}, stock=True)
    trainer = MLCDPOTrainer(
        tiny, args=MLCDPOConfig(**options, **TERM), train_dataset=preferences(), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="mlc_state.safetensors: it was not written by an MLC trainer"):
        trainer.train(resume_from_checkpoint=str(Path(options["output_dir"]) / "checkpoint-2"))
