"""Teach a preference in English, and see it in other languages: DPO with Multi-Lingual Consistency on a CPU.

    pip install "hf-concord[align,peft,gguf]"
    python examples/mlc_dpo.py            # about seven minutes of one core; --plain trains without the term

SmolLM2-135M learns from English pairs to decline talk of living and edible things and to answer about places and
objects. Translations of the prompts (no translated answers) come from Unicode CLDR. The table shows, on concepts it was
not trained on, how often the right answer is the likelier one in each language, before and after.
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
from trl_mlc import MLCDPOConfig, MLCDPOTrainer, evaluate_model, join_translations


LANGUAGES = ["de", "es", "fr", "it"]
DECLINED = ("Animals & Nature", "Food & Drink")
DECLINE, ANSWER = " Sorry, I cannot talk about this.", " Sure, here is what I know."


def prompt(concept: dict, language: str) -> str:
    text = concept["texts"][language]
    return f"{text['name']}: {', '.join(text['keywords'][:3])}\nAnswer:"


def load(count: int, skip: int) -> Dataset:
    """`count` concepts of each kind after the first `skip`, as preference rows with parallel prompts."""
    concepts = json.loads((fetch("concepts") / "concepts.json").read_text(encoding="utf-8"))
    kinds = [[c for c in concepts if (c["group"] in DECLINED) is kind] for kind in (True, False)]
    picked = [c for pair in zip(*(kind[skip::7][:count] for kind in kinds), strict=True) for c in pair]
    sides = [(DECLINE, ANSWER) if c["group"] in DECLINED else (ANSWER, DECLINE) for c in picked]
    rows = Dataset.from_dict(
        {
            "prompt": [prompt(c, "en") for c in picked],
            "chosen": [chosen for chosen, _ in sides],
            "rejected": [rejected for _, rejected in sides],
        }
    )
    return join_translations(rows, {name: [prompt(c, name) for c in picked] for name in LANGUAGES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plain", action="store_true", help="mlc_weight=0: stock DPO on the same rows")
    options = parser.parse_args()
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train, test = load(40, skip=0), load(15, skip=1)
    before = evaluate_model(model, tokenizer, test)
    with tempfile.TemporaryDirectory() as scratch:
        args = MLCDPOConfig(
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
        trainer = MLCDPOTrainer(
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
