"""The trainers against the stock ones: equal where they must be, different where they should be."""

import functools
import hashlib
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.mlc.conftest import rows, run_options
from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer
from trl_mlc.scan import best_layer, complete_groups, scan_layers
from trl_mlc.sft import MLCSFTConfig, MLCSFTTrainer


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, MLCDPOTrainer, MLCDPOConfig),
    "sft": (SFTTrainer, SFTConfig, MLCSFTTrainer, MLCSFTConfig),
}
TERM = {"mlc_layer": 3, "mlc_extractor_dim": 16, "mlc_every": 1}
TIMES = ("runtime", "per_second")


def columns_for(method, data):
    return data if method == "dpo" else data.rename_column("chosen", "completion").remove_columns("rejected")


def digest(trainer) -> str:
    state = trainer.model.state_dict()
    total = hashlib.sha256()
    for name in sorted(state):
        if "mlc_extractor" not in name:
            total.update(state[name].cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def numbers(trainer) -> list[dict]:
    history = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in history]


def train(method, tiny, tokenizer, data, options, stock=False, lora=False, eval_data=None, **extra):
    base, base_config, ours, our_config = TRAINERS[method]
    config = base_config(**options, **extra) if stock else our_config(**options, **extra)
    trainer = (base if stock else ours)(
        tiny,
        args=config,
        train_dataset=columns_for(method, data),
        eval_dataset=eval_data if eval_data is None else columns_for(method, eval_data),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def once(tiny, tokenizer, tmp_path_factory):
    """Weights and logs of runs that several tests compare with, each trained once."""

    @functools.cache
    def run(method, stock=False, lora=False, missing=0, steps=3):
        options = run_options(tmp_path_factory.mktemp("once")) | {"max_steps": steps}
        data = Dataset.from_dict(rows(missing=missing))
        trainer = train(method, tiny, tokenizer, data, options, stock=stock, lora=lora, **({} if stock else TERM))
        return digest(trainer), numbers(trainer)

    return run


@pytest.mark.parametrize("method", list(TRAINERS))
def test_weight_zero_is_the_stock_trainer_bit_for_bit(method, tiny, tokenizer, preferences, options):
    extra = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    runs = [
        train(
            method, tiny, tokenizer, preferences(), options, stock=stock, eval_data=preferences(n=4), **extra, **more
        )
        for stock, more in ((True, {}), (False, {"mlc_weight": 0.0}))
    ]
    assert digest(runs[0]) == digest(runs[1])
    assert numbers(runs[0]) == numbers(runs[1])
    assert not any("mlc" in key for entry in numbers(runs[1]) for key in entry)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", list(TRAINERS))
def test_the_term_trains_model_and_extractor(method, lora, tiny, tokenizer, preferences, options, once):
    ours = train(method, tiny, tokenizer, preferences(missing=3), options, lora=lora, **TERM)
    first, last = numbers(ours)[0], numbers(ours)[2]
    assert digest(ours) != once(method, stock=True, lora=lora, missing=3)[0]
    assert 0 < first["mlc/loss"] <= math.log(4)
    assert first["mlc/languages"] > 2
    assert {"mlc/energy", "mlc/cosine_min", "mlc/cross_prompt_cosine"} <= first.keys()
    assert last["mlc/loss"] != first["mlc/loss"]
    before = type(ours._mlc_pass.extractor)(32, 16, seed=ours.args.seed).state_dict()
    for name, value in ours._mlc_pass.extractor.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} did not move"


@pytest.mark.parametrize("method", list(TRAINERS))
def test_the_first_stock_numbers_do_not_notice_the_term(method, once):
    stock, ours = (once(method, stock=stock, lora=True, steps=1)[1][0] for stock in (True, False))
    for key in set(stock) - {"loss", "grad_norm"}:
        assert ours[key] == stock[key], key
    assert ours["loss"] == pytest.approx(stock["loss"] + 0.8 * ours["mlc/loss"], abs=2e-4)


def test_text_and_conversational_prompts_are_read_to_where_the_answer_begins(tiny, tokenizer, preferences, options):
    options["max_steps"] = 1
    for conversational in (False, True):
        trainer = train("dpo", tiny, tokenizer, preferences(conversational=conversational), options, **TERM)
        row = trainer.train_dataset[0]
        texts = [tokenizer.decode(ids) for ids in row["mlc_input_ids"]]
        assert texts[0] == ("<|user|>say cat 0<|end|><|assistant|>" if conversational else "say cat 0")
        assert row["mlc_input_ids"][0] == row["prompt_ids"]
        assert [trainer._mlc_languages.names[i] for i in row["mlc_language_ids"]] == ["en", "ar", "bn", "sw"]


@pytest.mark.parametrize("method", list(TRAINERS))
def test_accumulation_split_does_not_matter(method, tiny, tokenizer, preferences, options):
    options.pop("per_device_train_batch_size")
    whole, split = (
        numbers(
            train(
                method,
                tiny,
                tokenizer,
                preferences(missing=3),
                {**options, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size},
                train_sampling_strategy="sequential",
                optim="sgd",
                mlc_buckets=1,
                **TERM,
            )
        )
        for size in (4, 2)
    )
    for a, b in zip(whole[:3], split[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_checkpointing_and_buckets_give_the_same_run(tiny, tokenizer, preferences, options):
    reference = train("dpo", tiny, tokenizer, preferences(), options, mlc_buckets=1, **TERM)
    options["gradient_checkpointing"] = True
    assert digest(train("dpo", tiny, tokenizer, preferences(), options, mlc_buckets=1, **TERM)) == digest(reference)
    for buckets in (0, 3):
        trainer = train("dpo", tiny, tokenizer, preferences(), options, mlc_buckets=buckets, **TERM)
        assert trainer._mlc_pass.buckets == buckets
        other = numbers(trainer)[-2]
        assert other["mlc/loss"] == pytest.approx(numbers(reference)[-2]["mlc/loss"], rel=1e-4)


def test_prompts_of_a_model_that_would_mix_them_are_divided_by_length(
    tiny, tokenizer, preferences, options, monkeypatch
):
    monkeypatch.setattr("trl_mlc.mixin.keeps_apart", lambda decoder, layer: False)
    assert train("dpo", tiny, tokenizer, preferences(), options, **TERM)._mlc_pass.buckets == 6


def test_every_second_step_and_a_subset_of_languages(tiny, tokenizer, preferences, options):
    options["max_steps"] = 4
    extra = {**TERM, "mlc_every": 2, "mlc_languages_per_step": 2}
    log = numbers(train("dpo", tiny, tokenizer, preferences(), options, **extra))[:4]
    assert ["mlc/loss" in entry for entry in log] == [True, False, True, False]
    assert log[0]["mlc/languages"] == 2


def test_dropout_of_the_host_loss_does_not_depend_on_the_term(tmp_path, tokenizer, preferences, options):
    from tests.mlc.conftest import tiny_llama

    model = tiny_llama(tokenizer)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "dropout")
    extra = {"learning_rate": 0.0}
    options.pop("learning_rate")
    stock = train("sft", str(tmp_path / "dropout"), tokenizer, preferences(), options, stock=True, **extra)
    ours = train("sft", str(tmp_path / "dropout"), tokenizer, preferences(), options, **extra, **TERM)
    assert [e.get("entropy") for e in numbers(stock)] == [e.get("entropy") for e in numbers(ours)]


def test_evaluation_logs_the_term_and_leaves_eval_loss_alone(tiny, tokenizer, preferences, options):
    data = preferences(n=4)
    options["learning_rate"] = 0.0
    stock = train("dpo", tiny, tokenizer, preferences(), options, stock=True, eval_data=data)
    ours = train("dpo", tiny, tokenizer, preferences(), options, eval_data=data, **TERM)
    plain, found = stock.evaluate(), ours.evaluate()
    assert found["eval_loss"] == plain["eval_loss"]
    assert found["eval_mlc/loss"] > 0
    fresh = ours.evaluate(preferences(n=6, missing=2))
    assert fresh["eval_mlc/loss"] > 0
    none = ours.evaluate(data.remove_columns("prompt_translations"))
    assert none["eval_loss"] == plain["eval_loss"]
    ours.args.mlc_in_eval_loss = True
    added = ours.evaluate()
    assert added["eval_loss"] == pytest.approx(plain["eval_loss"] + 0.8 * added["eval_mlc/loss"], rel=1e-5)


def test_precomputed_reference_never_sees_the_prompts(tiny, tokenizer, preferences, options, once):
    live = once("dpo")[1]
    before = train("dpo", tiny, tokenizer, preferences(), options, precompute_ref_log_probs=True, **TERM)
    assert live[0]["mlc/loss"] == numbers(before)[0]["mlc/loss"]
    assert live[2]["loss"] == pytest.approx(numbers(before)[2]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "variant",
    [
        {"mlc_center": "language"},
        {"mlc_center": "common", "mlc_signed": True},
        {"mlc_repulsion": 0.5},
        {"mlc_extractor_dim": 0},
        {"mlc_extractor_frozen": True},
        {"mlc_objective": "cosine"},
        {"mlc_objective": "none", "mlc_repulsion": 0.5},
        {"mlc_contrast": 0.5, "mlc_anchor_detached": True},
        {"mlc_signed": True, "mlc_sigma_norm": "none"},
        {"mlc_pooling": "mean", "mlc_layer": -1},
        {"mlc_extractor_lr": 1e-3},
        {"mlc_layer": "auto", "mlc_scan_prompts": 8},
    ],
)
def test_every_variant_trains(variant, tiny, tokenizer, preferences, options, once):
    options["max_steps"] = 2
    other = train("dpo", tiny, tokenizer, preferences(missing=3), options, **{**TERM, **variant})
    assert math.isfinite(numbers(other)[-1]["train_loss"])
    assert digest(other) != once("dpo", missing=3, steps=2)[0]
    if "mlc_contrast" in variant:
        assert 0 < numbers(other)[0]["mlc/contrast"] < 10
    if variant.get("mlc_extractor_frozen"):
        fresh = type(other._mlc_pass.extractor)(32, 16, seed=other.args.seed).state_dict()
        assert all(torch.equal(v, fresh[k]) for k, v in other._mlc_pass.extractor.state_dict().items())
    if "mlc_extractor_lr" in variant:
        assert [g["initial_lr"] for g in other.optimizer.param_groups] == [1e-2, 1e-2, 1e-3]


def test_auto_takes_the_layer_that_a_scan_finds_and_shows_all(tiny, tokenizer, preferences, options, caplog):
    with caplog.at_level("WARNING", logger="trl_mlc.first_states"):
        args = MLCDPOConfig(**options, mlc_layer="auto", mlc_scan_prompts=8)
        trainer = MLCDPOTrainer(tiny, args=args, train_dataset=preferences(), processing_class=tokenizer)
    groups = complete_groups(list(trainer.train_dataset), 8)
    scores = scan_layers(trainer.model.model, groups, poolings=["last"])
    assert trainer._mlc_pass.layer == best_layer(scores).layer
    assert [f"{s.layer}: {s.retrieval:.2f}, {s.cross_prompt_cosine:.3f}" in caplog.text for s in scores] == [True] * 4


def test_bfloat16_keeps_every_token_id(tiny, tokenizer, preferences, options):
    options |= {"bf16": True, "max_steps": 1}
    data = preferences()
    data = data.map(lambda r: {"prompt": r["prompt"] + "<|x39|>"})
    trainer = train("sft", tiny, tokenizer, data, options, **TERM)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["mlc_prompts"]
    assert batch["input_ids"].dtype == torch.int64
    assert tokenizer.convert_tokens_to_ids("<|x39|>") in batch["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|x39|>") > 256
