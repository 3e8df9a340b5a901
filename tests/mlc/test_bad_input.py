"""Each mistake is told before training, with what was got and what to do."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PrefixTuningConfig
from transformers import T5Config, T5ForConditionalGeneration
from trl import DPOConfig

from tests.mlc.conftest import rows
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.sft import MLCSFTConfig, MLCSFTTrainer


TERM = {"mlc_layer": 3, "mlc_extractor_dim": 8}


def build(tiny, tokenizer, data, options, model=None, **extra):
    peft = extra.pop("peft_config", None)
    return MLCDPOTrainer(
        model or tiny,
        args=MLCDPOConfig(**{**options, **TERM, **extra}),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft,
    )


def with_column(column):
    table = rows(n=4)
    table["prompt_translations"] = column
    return Dataset.from_dict(table)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"packing": True}, "packing=True mixes several rows.*Set packing=False"),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"torch_compile": True}, "torch_compile=True cannot trace"),
        ({"mlc_weight": -1.0}, "mlc_weight must be at least 0, got -1.0"),
    ],
)
def test_options_that_cannot_work(option, message, options):
    with pytest.raises(ValueError, match=message):
        MLCSFTConfig(**options, **option)


def test_context_parallelism_is_refused(options):
    class Parallelism:
        cp_size, sp_size = 2, 1

    config = MLCSFTConfig(**options)
    config.parallelism_config = Parallelism()
    with pytest.raises(ValueError, match="cp_size=2 splits a sequence"):
        config._check_host_options()


def test_options_of_a_switched_off_term_do_not_matter(options):
    assert MLCSFTConfig(**options, mlc_weight=0, packing=True).packing


@pytest.mark.parametrize("layer", [5, -6])
def test_layer_out_of_range(layer, tiny, tokenizer, preferences, options):
    with pytest.raises(ValueError, match=rf"mlc_layer={layer} is outside .* 0 \(embeddings\) to 4"):
        build(tiny, tokenizer, preferences(), options, mlc_layer=layer)


def test_encoder_decoder(tiny, tokenizer, preferences, options):
    config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="encoder-decoder"):
        build(tiny, tokenizer, preferences(), options, model=T5ForConditionalGeneration(config))


def test_stock_config_is_refused(tiny, tokenizer, preferences, options):
    with pytest.raises(TypeError, match="needs args of type MLCDPOConfig, got DPOConfig"):
        MLCDPOTrainer(tiny, args=DPOConfig(**options), train_dataset=preferences(), processing_class=tokenizer)


def test_prompt_learning_adapters_are_refused(tiny, tokenizer, preferences, options):
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        build(tiny, tokenizer, preferences(), options, peft_config=prefix)


def test_missing_column(tiny, tokenizer, preferences, options):
    with pytest.raises(ValueError, match=r"columns \['chosen', 'prompt', 'rejected'\] but no 'prompt_translations'"):
        build(tiny, tokenizer, preferences().remove_columns("prompt_translations"), options)


@pytest.mark.parametrize("column", [["habari"] * 4, [["habari"]] * 4, [{"sw": 3}] * 4])
def test_column_of_a_wrong_type(column, tiny, tokenizer, options):
    with pytest.raises(ValueError, match="holds .*it must be"):
        build(tiny, tokenizer, with_column(column), options)


@pytest.mark.parametrize("empty", [{"sw": None}, {"sw": ""}, []])
def test_column_empty_in_every_row(empty, tiny, tokenizer, options):
    with pytest.raises(ValueError, match="empty in every row"):
        build(tiny, tokenizer, with_column([empty] * 4), options)


def test_anchor_that_is_also_a_translation(tiny, tokenizer, options):
    with pytest.raises(ValueError, match="holds the anchor language 'en'"):
        build(tiny, tokenizer, with_column([{"en": "say", "sw": "sema"}] * 4), options)


def test_language_that_no_row_has(tiny, tokenizer, preferences, options):
    with pytest.raises(ValueError, match=r"names \['xx'\], but column 'prompt_translations' has only \['ar'"):
        build(tiny, tokenizer, preferences(), options, mlc_languages=["sw", "xx"])


def test_data_without_a_prompt(tiny, tokenizer, options):
    data = Dataset.from_dict({"text": ["a b"] * 4, "prompt_translations": [{"sw": "c"}] * 4})
    with pytest.raises(ValueError, match="has no prompt for MLC"):
        MLCSFTTrainer(tiny, args=MLCSFTConfig(**options, **TERM), train_dataset=data, processing_class=tokenizer)


def test_preference_rows_are_no_data_for_fine_tuning(tiny, tokenizer, preferences, options):
    args = MLCSFTConfig(**{**options, **TERM})
    with pytest.raises(ValueError, match="needs a 'completion' beside 'prompt'.*'chosen' and 'rejected' are for DPO"):
        MLCSFTTrainer(tiny, args=args, train_dataset=preferences(), processing_class=tokenizer)


def test_prepared_data_without_prompts(tiny, tokenizer, options):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
    config = MLCSFTConfig(**options, **TERM, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="not prepared by the trainer"):
        MLCSFTTrainer(tiny, args=config, train_dataset=data, processing_class=tokenizer)


def test_long_prompts_are_left_out_and_counted(tiny, tokenizer, preferences, options, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_mlc.data"):
        trainer = build(tiny, tokenizer, preferences(n=4), options, mlc_max_length=20)
    table = rows(n=4)
    texts = table["prompt"] + [t for group in table["prompt_translations"] for t in group.values()]
    too_long = sum(len(text) > 20 for text in texts)  # one token per letter
    assert 0 < too_long < len(texts)
    assert f"{too_long} prompts of the train dataset" in caplog.text
    lengths = [len(ids) for row in trainer.train_dataset for ids in row["mlc_input_ids"]]
    assert max(lengths) <= 20
    kept = [tokenizer.decode(ids) for row in trainer.train_dataset for ids in row["mlc_input_ids"]]
    assert sorted(kept) == sorted(text for text in texts if len(text) <= 20)
    with pytest.raises(ValueError, match="left out for their length"):
        build(tiny, tokenizer, preferences(n=4), options, mlc_max_length=2)


def test_streamed_data_needs_names_and_then_trains(tiny, tokenizer, options):
    table = rows(n=6)
    table["prompt_translations"] = [
        [{"lang": k, "prompt": v} for k, v in t.items()] for t in table["prompt_translations"]
    ]
    listed = Dataset.from_dict(table)

    def stream():
        return IterableDataset.from_generator(lambda: iter(listed))

    with pytest.raises(ValueError, match="name them with mlc_languages"):
        build(tiny, tokenizer, stream(), options)
    trainer = build(tiny, tokenizer, stream(), options, mlc_languages=["sw", "ar"], max_steps=1, mlc_every=1)
    trainer.train()
    assert trainer.state.log_history[0]["mlc/languages"] == 3


def test_host_that_never_runs_the_prompts_is_noticed(tiny, tokenizer, preferences, options):
    trainer = build(tiny, tokenizer, preferences(), options)
    trainer._mlc_pass._request = None
    trainer._mlc_pass.request = lambda *_: None
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with pytest.raises(RuntimeError, match="did not run the parallel prompts"), torch.enable_grad():
        trainer.compute_loss(trainer.model, batch)
