"""Supervised fine-tuning on English answers that keeps translated prompts together, on a CPU.

    pip install "hf-concord[align,peft,gguf]"
    python examples/mlc_sft.py            # a few minutes of one core; --plain trains without the term

SmolLM2-135M learns to name the kind of a thing in one English word. Only English rows have answers; German, Spanish,
French and Italian prompts come without any. The table shows, on things it was not trained on, how often the right kind
is likelier than a wrong one, before and after.
"""

import tempfile

import torch
from datasets import Dataset
from mlc_setup import SETTINGS, adapter, fetch, options, pick, show, with_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_mlc import MLCSFTConfig, MLCSFTTrainer, evaluate_model


KINDS = {"Animals & Nature": " nature", "Food & Drink": " food", "Travel & Places": " place", "Objects": " object"}


def load(count: int, skip: int) -> tuple[Dataset, list[str]]:
    """`count` concepts of each kind after the first `skip`: rows with parallel prompts, and a wrong kind for each."""
    picked = pick([(kind,) for kind in KINDS], count, skip, step=6)
    rows = with_prompts(picked, "Kind:", {"completion": [KINDS[c["group"]] for c in picked]})
    names = list(KINDS)
    return rows, [KINDS[names[(names.index(c["group"]) + 1 + i % 3) % 4]] for i, c in enumerate(picked)]


def main() -> None:
    given = options(__doc__)
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train, _ = load(20, skip=0)
    held_out, wrong = load(10, skip=1)
    test = held_out.rename_column("completion", "chosen").add_column("rejected", wrong)
    print("Scoring the model as it is ...", flush=True)
    before = evaluate_model(model, tokenizer, test)
    with tempfile.TemporaryDirectory() as scratch:
        args = MLCSFTConfig(
            output_dir=scratch, max_steps=given.steps, mlc_weight=0.0 if given.plain else 1.0, **SETTINGS
        )
        trainer = MLCSFTTrainer(
            model, args=args, train_dataset=train, processing_class=tokenizer, peft_config=adapter()
        )
        trainer.train()
    print("Scoring it again ...", flush=True)
    show(before, evaluate_model(trainer.model, tokenizer, test))


if __name__ == "__main__":
    main()
