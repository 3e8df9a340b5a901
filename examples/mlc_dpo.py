"""Teach a preference in English, and see it in other languages: DPO with Multi-Lingual Consistency on a CPU.

    pip install "hf-concord[align,peft,gguf]"
    python examples/mlc_dpo.py            # about seven minutes of one core; --plain trains without the term

SmolLM2-135M learns from English pairs to decline talk of living and edible things and to answer about places and
objects. Translations of the prompts (no translated answers) come from Unicode CLDR. The table shows, on concepts it was
not trained on, how often the right answer is the likelier one in each language, before and after.
"""

import tempfile

import torch
from datasets import Dataset
from mlc_setup import SETTINGS, adapter, fetch, options, pick, show, with_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_mlc import MLCDPOConfig, MLCDPOTrainer, evaluate_model


DECLINED, ANSWERED = ("Animals & Nature", "Food & Drink"), ("Travel & Places", "Objects")
DECLINE, ANSWER = " Sorry, I cannot talk about this.", " Sure, here is what I know."


def load(count: int, skip: int) -> Dataset:
    """`count` concepts of each kind after the first `skip`, as preference rows with parallel prompts."""
    picked = pick([DECLINED, ANSWERED], count, skip, step=7)
    sides = [(DECLINE, ANSWER) if c["group"] in DECLINED else (ANSWER, DECLINE) for c in picked]
    columns = {"chosen": [chosen for chosen, _ in sides], "rejected": [rejected for _, rejected in sides]}
    return with_prompts(picked, "Answer:", columns)


def main() -> None:
    given = options(__doc__)
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train, test = load(40, skip=0), load(15, skip=1)
    print("Scoring the model as it is ...", flush=True)
    before = evaluate_model(model, tokenizer, test)
    with tempfile.TemporaryDirectory() as scratch:
        args = MLCDPOConfig(
            output_dir=scratch, max_steps=given.steps, mlc_weight=0.0 if given.plain else 1.0, **SETTINGS
        )
        trainer = MLCDPOTrainer(
            model, args=args, train_dataset=train, processing_class=tokenizer, peft_config=adapter()
        )
        trainer.train()
    print("Scoring it again ...", flush=True)
    show(before, evaluate_model(trainer.model, tokenizer, test))


if __name__ == "__main__":
    main()
