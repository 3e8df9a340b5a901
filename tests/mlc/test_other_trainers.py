"""KTO, Reward, CPO, SimPO and ORPO carry the same term."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForSequenceClassification
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.mlc.test_trainers import TERM, digest, numbers
from trl_mlc.cpo import MLCCPOConfig, MLCCPOTrainer
from trl_mlc.kto import MLCKTOConfig, MLCKTOTrainer
from trl_mlc.orpo import MLCORPOConfig, MLCORPOTrainer
from trl_mlc.reward import MLCRewardConfig, MLCRewardTrainer


TRAINERS = {
    "kto": (KTOTrainer, KTOConfig, MLCKTOTrainer, MLCKTOConfig, {}),
    "reward": (RewardTrainer, RewardConfig, MLCRewardTrainer, MLCRewardConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, MLCCPOTrainer, MLCCPOConfig, {"max_length": 64}),
    "simpo": (CPOTrainer, CPOConfig, MLCCPOTrainer, MLCCPOConfig, {"max_length": 64, "loss_type": "simpo"}),
    "orpo": (ORPOTrainer, ORPOConfig, MLCORPOTrainer, MLCORPOConfig, {"max_length": 64}),
}


def train(method, tiny, tokenizer, data, options, stock=False, lora=False, eval_data=None, **extra):
    base, base_config, ours, our_config, more = TRAINERS[method]
    options = {**options, **more, **extra}
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if method == "reward":
        model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    else:
        model = tiny if method == "kto" else AutoModelForCausalLM.from_pretrained(tiny)
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = (base if stock else ours)(
        model,
        args=(base_config if stock else our_config)(**options),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", list(TRAINERS))
def test_weight_zero_is_the_stock_trainer_bit_for_bit(method, tiny, tokenizer, preferences, options):
    options["max_steps"] = 2
    stock = train(method, tiny, tokenizer, preferences(), options, stock=True, eval_data=preferences(n=4))
    ours = train(method, tiny, tokenizer, preferences(), options, eval_data=preferences(n=4), mlc_weight=0.0)
    stock.evaluate(), ours.evaluate()
    assert digest(stock) == digest(ours)
    assert numbers(stock) == numbers(ours)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", list(TRAINERS))
def test_the_term_reaches_model_and_extractor(method, lora, tiny, tokenizer, preferences, options):
    options["max_steps"] = 2
    data, held_out = preferences(missing=3), preferences(n=4)
    ours = train(method, tiny, tokenizer, data, options, lora=lora, eval_data=held_out, **TERM)
    first = numbers(ours)[0]
    assert 0 < first["mlc/loss"] <= math.log(4)
    if not lora:
        stock = train(method, tiny, tokenizer, data, options, stock=True, eval_data=held_out)
        assert digest(ours) != digest(stock)
    before = type(ours._mlc_pass.extractor)(32, 16, seed=ours.args.seed).state_dict()
    for name, value in ours._mlc_pass.extractor.state_dict().items():
        assert (value - before[name]).abs().max() > 1e-3, f"{method}: {name} did not move"
    found = ours.evaluate()
    assert found["eval_mlc/loss"] > 0


def test_kto_keeps_the_prompts_for_the_forward_with_gradients(tiny, tokenizer, preferences, options):
    options["max_steps"] = 1
    trainer = train("kto", tiny, tokenizer, preferences(), options, **TERM)
    assert trainer.calculate_KL
    seen = []
    inner = trainer._mlc_pass._run

    def watched(*args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return inner(*args, **kwargs)

    trainer._mlc_pass._run = watched
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    assert seen == [True]
