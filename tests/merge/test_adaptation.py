"""Residual-frozen adaptation and the donor's lessons: algebra, training, TRL, PEFT."""

import pytest
import torch

from mergekit_ot.adaptation import attach_residuals, fold_residuals
from mergekit_ot.anchors import match_text
from mergekit_ot.spelling import spell
from mergekit_ot.teacher import distribution_loss, prepare_lessons, stream_loss
from mergekit_ot.writing import continuations
from tests.merge.tiny import build, texts, tokenizer


def transports(seed=1):
    donor = build(seed=seed).state_dict()
    return lambda name, weight: donor[name].clone() if ".mlp." in name else None


def test_attached_weights_are_the_interpolation_and_fold_back():
    model, transport = build(), transports()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = attach_residuals(model, transport, 0.25)
    assert len(attached) == 12
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    torch.testing.assert_close(weight, 0.75 * before[f"{name}.weight"] + 0.25 * transport(f"{name}.weight", None))
    ids = torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        attached_logits = model(ids).logits
        assert fold_residuals(model) == 12
        torch.testing.assert_close(model(ids).logits, attached_logits)
    assert set(model.state_dict()) == set(before)


def test_only_the_base_is_trained():
    model, transport = build(), transports()
    attach_residuals(model, transport, 0.5)
    layer = model.model.layers[0].mlp.up_proj
    frozen = layer.parametrizations.weight[0].transported.clone()
    base = layer.parametrizations.weight.original.detach().clone()
    model(torch.randint(0, 300, (1, 20))).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(layer.parametrizations.weight[0].transported, frozen)
    assert not torch.equal(layer.parametrizations.weight.original, base)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        attach_residuals(build(), transport, 1.0)


def test_losses_in_closed_form():
    probabilities = torch.tensor([[0.7, 0.3]])
    tokens = torch.tensor([[4, 1]])
    logits = torch.full((1, 6), -1e9)
    logits[0, 4], logits[0, 1] = torch.log(torch.tensor(0.7)), torch.log(torch.tensor(0.3))
    entropy = -(probabilities * probabilities.log()).sum()
    torch.testing.assert_close(distribution_loss(logits, tokens, probabilities), entropy)
    assert distribution_loss(logits.flip(1), tokens, probabilities) > entropy
    stream = torch.randn(3, 8)
    normed = stream / stream.square().mean(dim=1, keepdim=True).sqrt()
    assert stream_loss(5.0 * stream, normed) < 1e-10
    torch.testing.assert_close(stream_loss(stream, torch.zeros(3, 8)), torch.tensor(1.0))


def lessons(count=8, **options):
    small, large = tokenizer(), tokenizer(400)
    matched = [match_text(text, small, large, max_length=64, skip=0) for text in texts(count, seed=9)]
    donor = build(seed=7, vocab_size=400, hidden_size=48, num_attention_heads=6)
    return prepare_lessons(
        donor, matched, spell(small, large, 400), 300, top=32, stream_map=torch.eye(32, 48), **options
    )


def test_lessons_do_not_depend_on_what_is_read_together():
    for alone, together in zip(lessons(5), lessons(5, batch=4), strict=True):
        assert torch.equal(alone.rows, together.rows)
        assert torch.equal(alone.state_rows, together.state_rows)
        torch.testing.assert_close(alone.probabilities, together.probabilities, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone.states, together.states, rtol=1e-4, atol=1e-5)
        assert len(alone.state_rows) < len(alone.rows)  # inside a word there is no shared state


def test_a_model_is_its_own_perfect_teacher():
    small = tokenizer()
    model = build()
    matched = [match_text(text, small, small, max_length=64, skip=0) for text in texts(2)]
    made = prepare_lessons(model, matched, spell(small, small, 300), 300, top=300, stream_map=torch.eye(32))
    with torch.no_grad():
        for lesson in made:
            output = model(lesson.ids[None], output_hidden_states=True)
            q = lesson.probabilities
            entropy = -(q * q.clamp_min(1e-30).log()).sum(dim=1).mean()
            taught = distribution_loss(output.logits[0, lesson.rows], lesson.tokens, q)
            torch.testing.assert_close(taught, entropy, atol=1e-4, rtol=1e-4)
            assert stream_loss(output.hidden_states[-2][0, lesson.state_rows], lesson.states) < 1e-8


def test_continuations_are_those_of_a_model_read_anew_and_end_where_it_ends():
    model = build()
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [1, 2]]
    greedy = continuations(model, prompts, samples=2, new_tokens=6, choices=1, together=3)
    assert [row[:4] for row in greedy] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert greedy[0] == greedy[1]
    for row in greedy:
        with torch.no_grad():
            assert model(torch.tensor([row[:-1]])).logits[0, 3:].argmax(-1).tolist() == row[4:]
    model.generation_config.eos_token_id = greedy[2][6]
    assert continuations(model, prompts, new_tokens=6, choices=1)[1] == greedy[2][:6]
    drawn = [continuations(model, prompts, samples=8, new_tokens=6, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert continuations(model, [], new_tokens=6) == []


@pytest.mark.parametrize("peft", [False, True])
def test_trl_trains_on_lessons_around_a_frozen_residual(tmp_path, peft):
    pytest.importorskip("trl")
    from datasets import Dataset

    from mergekit_ot.trainer import TransportSFTConfig, TransportSFTTrainer, lesson_rows

    made, model = lessons(), build()
    attach_residuals(model, transports(), 0.2)
    adapter = None
    if peft:
        from peft import LoraConfig

        adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    config = TransportSFTConfig(
        output_dir=str(tmp_path),
        distribution_weight=0.7,
        stream_weight=0.1,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = TransportSFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(lesson_rows(made)),
        processing_class=tokenizer(),
        lessons=made,
        peft_config=adapter,
    )
    trainer.train()
    history = [entry["donor_cross_entropy"] for entry in trainer.state.log_history if "donor_cross_entropy" in entry]
    assert sum(history[-3:]) / 3 < sum(history[:3]) / 3 - 0.05
    assert trainer.fold() == 12


def test_weights_of_the_losses_are_checked(tmp_path):
    pytest.importorskip("trl")
    from mergekit_ot.trainer import TransportSFTConfig

    with pytest.raises(ValueError, match="distribution_weight must lie in"):
        TransportSFTConfig(output_dir=str(tmp_path), distribution_weight=2.0, use_cpu=True, bf16=False)


def test_lessons_longer_than_the_trainer_reads_are_refused(tmp_path):
    pytest.importorskip("trl")
    from mergekit_ot.trainer import TransportSFTConfig, TransportSFTTrainer, lesson_rows

    made = lessons(2)
    longest = max(len(lesson.ids) for lesson in made)
    config = TransportSFTConfig(output_dir=str(tmp_path), max_length=longest - 1, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"max_length={longest - 1} would cut texts of {longest} tokens"):
        TransportSFTTrainer(model=build(), args=config, lessons=made, train_dataset=lesson_rows(made))
