"""What `mlc_dpo.py` and `mlc_sft.py` share: the concepts, the settings of a run on a CPU, the table at the end."""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.assets, from a checkout

from datasets import Dataset
from peft import LoraConfig

from tools.assets import fetch
from trl_mlc import join_translations


LANGUAGES = ["de", "es", "fr", "it"]
SETTINGS = {
    "mlc_layer": "auto",
    "mlc_extractor_dim": 0,
    "mlc_center": "common",
    "mlc_signed": True,
    "mlc_contrast": 1.0,
    "mlc_anchor_detached": True,
    "mlc_every": 1,
    "mlc_languages_per_step": 3,
    "mlc_scan_prompts": 24,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "warmup_steps": 3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "seed": 0,
}


def options(about: str) -> argparse.Namespace:
    """The command line of both examples."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plain", action="store_true", help="mlc_weight=0: the stock trainer on the same rows")
    return parser.parse_args()


def pick(kinds: list[tuple[str, ...]], count: int, skip: int, step: int) -> list[dict]:
    """`count` concepts of each kind (groups of CLDR), every `step`-th after the first `skip`, the kinds in turn."""
    concepts = json.loads((fetch("concepts") / "concepts.json").read_text(encoding="utf-8"))
    sorts = [[c for c in concepts if c["group"] in kind][skip::step][:count] for kind in kinds]
    return [c for group in zip(*sorts, strict=True) for c in group]


def with_prompts(concepts: list[dict], cue: str, columns: dict[str, list[str]]) -> Dataset:
    """Rows with a prompt in English, parallel prompts in `LANGUAGES`, and the other `columns`."""

    def prompt(concept: dict, language: str) -> str:
        text = concept["texts"][language]
        return f"{text['name']}: {', '.join(text['keywords'][:3])}\n{cue}"

    rows = Dataset.from_dict({"prompt": [prompt(c, "en") for c in concepts], **columns})
    return join_translations(rows, {name: [prompt(c, name) for c in concepts] for name in LANGUAGES})


def adapter() -> LoraConfig:
    """What is trained."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def show(before, after) -> None:
    """Print two reports of `evaluate_model` side by side."""
    print(f"\n{'language':10}{'accuracy':>20}{'retrieval at 1':>20}{'perplexity':>20}")
    for name in before.languages:
        cells = ""
        for metric in ("accuracy", "retrieval_at_1", "perplexity"):
            pair = [report.languages[name].get(metric) for report in (before, after)]
            cells += ("-" if None in pair else f"{pair[0]:.2f} -> {pair[1]:.2f}").rjust(20)
        print(f"{name:10}{cells}")
    for metric in ("mean_accuracy", "accuracy_variance_x100", "pairwise_agreement"):
        print(f"{metric}: {before.overall[metric]:.3f} -> {after.overall[metric]:.3f}")
