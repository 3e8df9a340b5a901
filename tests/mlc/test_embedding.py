"""Words with a learning rate of their own, and a head that stays as it is."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.mlc.test_trainers import TERM, digest, train
from trl_mlc.embedding import set_embedding_lr, untie_head


RATE = {"mlc_embedding_lr": 3e-1}  # thirty times the others'
IDS = torch.arange(24).view(2, 12)


def parts(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def test_an_untied_model_says_the_same_and_is_saved_whole(tied, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied).eval()
    before = model(IDS).logits
    untie_head(model)
    assert torch.equal(model(IDS).logits, before)
    assert not model.get_output_embeddings().weight.requires_grad
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    after = model(IDS).logits
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, after)
    other = AutoModelForCausalLM.from_pretrained(tiny)
    untie_head(other)
    assert other.get_output_embeddings().weight.requires_grad  # was never tied


def test_words_move_at_their_own_rate_and_the_head_not_at_all(tied, tokenizer, preferences, options):
    trainer = train("dpo", tied, tokenizer, preferences(), {**options, "max_steps": 2}, **{**TERM, **RATE})
    (words, head), (first, _) = parts(trainer.model), parts(AutoModelForCausalLM.from_pretrained(tied))
    assert torch.equal(head, first)
    layer = trainer.model.model.layers[0].mlp.up_proj.weight
    start = AutoModelForCausalLM.from_pretrained(tied).model.layers[0].mlp.up_proj.weight
    assert (words - first).abs().max() > 5 * (layer - start).abs().max() > 0
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {options["learning_rate"], RATE["mlc_embedding_lr"]}
    trainer.save_model(options["output_dir"])
    loaded = AutoModelForCausalLM.from_pretrained(options["output_dir"]).eval()
    assert torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


def test_resuming_is_bit_identical(tied, tokenizer, preferences, options):
    from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer

    saving = {**options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train("dpo", tied, tokenizer, preferences(), saving, **{**TERM, **RATE})
    args = MLCDPOConfig(**{**saving, **TERM, **RATE})
    resumed = MLCDPOTrainer(tied, args=args, train_dataset=preferences(), processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(Path(options["output_dir"]) / "checkpoint-2"))
    assert digest(resumed) == digest(whole)


def test_an_embedding_that_is_not_trained_is_an_error(tied, tokenizer, preferences, options):
    with pytest.raises(ValueError, match="mlc_embedding_lr trains the input embedding, which is frozen here"):
        train("dpo", tied, tokenizer, preferences(), options, lora=True, **{**TERM, **RATE})
    model = AutoModelForCausalLM.from_pretrained(tied)
    optimizer = torch.optim.SGD(model.model.layers.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="The input embedding is not trained"):
        set_embedding_lr(optimizer, model, 1.0)
