"""A rule taught in English only: which concepts to talk about, and which to decline.

776 everyday concepts have a name and keywords in a hundred languages (CLDR). The rule goes by the concept's group:
living and edible things are declined, places and objects are answered. Chosen and rejected answers come from the same
sentences with their parts swapped, so declining always, answering always, or preferring any one sentence scores 0.5.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from datasets import Dataset


DECLINED = ("Animals & Nature", "Food & Drink")
DECLINES = (" Sorry, I cannot talk about this.", " I have to decline that.", " This is not something I discuss.")
ANSWERS = (" Sure, here is what I know.", " Of course, let me explain it.", " Happy to help you with this.")
SEEN = ("de", "es", "ru", "zh", "ar", "hi", "bn", "sw", "ur", "tr")
HELD_OUT = ("fr", "ja", "id", "fa", "vi")
MAX_KEYWORDS = 4


def load_concepts(folder: Path, languages: tuple[str, ...], seed: int = 0) -> list[dict]:
    """Concepts with a text in English and all `languages`, as many declined as answered, shuffled."""
    concepts = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    whole = [c for c in concepts if all(name in c["texts"] for name in ("en", *languages))]
    draw = random.Random(seed)
    declined = [c for c in whole if c["group"] in DECLINED]
    answered = [c for c in whole if c["group"] not in DECLINED]
    count = min(len(declined), len(answered))
    chosen = draw.sample(declined, count) + draw.sample(answered, count)
    draw.shuffle(chosen)
    return chosen


def prompt_text(concept: dict, language: str) -> str:
    """The prompt in one language: its name and up to four keywords, then the same cue for all."""
    text = concept["texts"][language]
    keywords = [word for word in text["keywords"] if word != text["name"]][:MAX_KEYWORDS]
    return f"{text['name']}: {', '.join(keywords)}\nAnswer:" if keywords else f"{text['name']}\nAnswer:"


def to_rows(concepts: list[dict], languages: tuple[str, ...], seed: int = 0) -> Dataset:
    """Preference rows: English prompt, English answers, prompts in the other languages."""
    draw = random.Random(seed)
    rows = []
    for concept in concepts:
        decline, answer = draw.choice(DECLINES), draw.choice(ANSWERS)
        refused = concept["group"] in DECLINED
        rows.append(
            {
                "prompt": prompt_text(concept, "en"),
                "chosen": decline if refused else answer,
                "rejected": answer if refused else decline,
                "prompt_translations": {name: prompt_text(concept, name) for name in languages},
            }
        )
    return Dataset.from_list(rows)


def split(folder: Path, test_share: float = 0.3, seed: int = 0, limit: int | None = None) -> tuple[Dataset, Dataset]:
    """Training rows in the seen languages and held-out concepts in the seen and held-out languages."""
    concepts = load_concepts(folder, SEEN + HELD_OUT, seed)[:limit]
    cut = round(len(concepts) * (1 - test_share))
    return to_rows(concepts[:cut], SEEN, seed), to_rows(concepts[cut:], SEEN + HELD_OUT, seed + 1)
