"""Supervised fine-tuning on English answers that keeps translated prompts together, on a CPU.

    pip install "hf-concord[align,peft,gguf]"
    python examples/mlc_sft.py            # a few minutes of one core; --plain trains without the term

SmolLM2-135M learns to name the kind of a thing in one English word. Only English rows have answers; German, Spanish,
French and Italian prompts come without any. The table shows, on things it was not trained on, how often the right kind
is likelier than a wrong one, before and after.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.assets, from a checkout

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.assets import fetch
from trl_mlc import MLCSFTConfig, MLCSFTTrainer, evaluate_model, join_translations


LANGUAGES = ["de", "es", "fr", "it"]
KINDS = {"Animals & Nature": " nature", "Food & Drink": " food", "Travel & Places": " place", "Objects": " object"}


def prompt(concept: dict, language: str) -> str:
    text = concept["texts"][language]
    return f"{text['name']}: {', '.join(text['keywords'][:3])}\nKind:"


def load(count: int, skip: int) -> tuple[Dataset, list[str]]:
    """`count` concepts of each kind after the first `skip`: rows with parallel prompts, and a wrong kind for each."""
    concepts = json.loads((fetch("concepts") / "concepts.json").read_text(encoding="utf-8"))
    kinds = [[c for c in concepts if c["group"] == kind][skip::6][:count] for kind in KINDS]
    picked = [c for group in zip(*kinds, strict=True) for c in group]
    rows = Dataset.from_dict(
        {"prompt": [prompt(c, "en") for c in picked], "completion": [KINDS[c["group"]] for c in picked]}
    )
    names = list(KINDS)
    wrong = [KINDS[names[(names.index(c["group"]) + 1 + i % 3) % 4]] for i, c in enumerate(picked)]
    return join_translations(rows, {name: [prompt(c, name) for c in picked] for name in LANGUAGES}), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plain", action="store_true", help="mlc_weight=0: stock SFT on the same rows")
    options = parser.parse_args()
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train, _ = load(20, skip=0)
    held_out, wrong = load(10, skip=1)
    test = held_out.rename_column("completion", "chosen").add_column("rejected", wrong)
    before = evaluate_model(model, tokenizer, test)
    with tempfile.TemporaryDirectory() as scratch:
        args = MLCSFTConfig(
            output_dir=scratch,
            mlc_weight=0.0 if options.plain else 1.0,
            mlc_layer="auto",
            mlc_center=True,
            mlc_repulsion=1.0,
            mlc_extractor_dim=0,
            mlc_every=1,
            mlc_languages_per_step=3,
            mlc_scan_prompts=24,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            warmup_steps=3,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            seed=0,
        )
        trainer = MLCSFTTrainer(
            model,
            args=args,
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
    after = evaluate_model(trainer.model, tokenizer, test)
    print(f"\n{'language':10}{'accuracy':>20}{'retrieval at 1':>20}{'perplexity':>20}")
    for name in before.languages:
        cells = ""
        for metric in ("accuracy", "retrieval_at_1", "perplexity"):
            pair = [report.languages[name].get(metric) for report in (before, after)]
            cells += ("-" if None in pair else f"{pair[0]:.2f} -> {pair[1]:.2f}").rjust(20)
        print(f"{name:10}{cells}")
    for metric in ("mean_accuracy", "accuracy_variance_x100", "pairwise_agreement"):
        print(f"{metric}: {before.overall[metric]:.3f} -> {after.overall[metric]:.3f}")


if __name__ == "__main__":
    main()
