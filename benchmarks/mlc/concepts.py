"""A rule taught in English only: which things to talk about, and which to decline.

Everyday concepts have a name in over a hundred languages (CLDR). A prompt names two concepts of one kind; the rule
goes by their kind: living and edible things are declined, places and objects are answered. Chosen and rejected answers
come from the same sentences with their parts swapped, so declining always, answering always, or preferring any one
sentence scores 0.5.

Languages: `POOL` is every language for which CLDR names (nearly) all concepts, in one script each. `VALIDATION`, a fifth of
them drawn once, are the only ones that settings are chosen by. Every seed of the table draws another fifth, of the rest, to
hold out, and teaches all that are left: so held-out languages are many, were not picked by anyone, and were not seen when
anything was chosen. `READ` are those in which the untouched model finds the English names of concepts by its own states
(`languages.py` measures it): of the drawn languages, these are scored as `held_out`, and all of them as `held_out_all`.

Two tests. `test` holds pairs that were never together in a prompt, of concepts that each were in some: as with real
prompts, the prompt is new and its words are not. `new_words`, a third as many, holds pairs of concepts that no training prompt
names in any language; there the term can only help with what the model already half knows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from datasets import Dataset

DECLINED = ("Animals & Nature", "Food & Drink")
DECLINES = (" Sorry, I cannot talk about this.", " I have to decline that.", " This is not something I discuss.")
ANSWERS = (" Sure, here is what I know.", " Of course, let me explain it.", " Happy to help you with this.")
POOL = (
    *(
        "af",
        "ak",
        "am",
        "ar",
        "as",
        "az",
        "ba",
        "be",
        "bg",
        "bn",
        "bs",
        "ca",
        "chr",
        "cs",
        "cv",
        "cy",
        "da",
        "de",
        "dsb",
        "el",
    ),
    *(
        "es",
        "et",
        "eu",
        "fa",
        "fi",
        "fil",
        "fo",
        "fr",
        "ga",
        "gd",
        "gl",
        "gu",
        "ha",
        "he",
        "hi",
        "hr",
        "hsb",
        "hu",
        "hy",
        "id",
    ),
    *(
        "ig",
        "is",
        "it",
        "ja",
        "jv",
        "ka",
        "kk",
        "km",
        "kn",
        "ko",
        "kok",
        "ky",
        "lo",
        "lt",
        "lv",
        "mk",
        "ml",
        "mn",
        "mr",
        "ms",
    ),
    *(
        "my",
        "ne",
        "nl",
        "no",
        "om",
        "or",
        "pa",
        "pcm",
        "pl",
        "ps",
        "pt",
        "qu",
        "rm",
        "ro",
        "ru",
        "sd",
        "shn",
        "si",
        "sk",
        "sl",
    ),
    *(
        "so",
        "sq",
        "sr",
        "sv",
        "sw",
        "ta",
        "te",
        "th",
        "ti",
        "tk",
        "to",
        "tr",
        "uk",
        "ur",
        "uz",
        "vi",
        "yo",
        "yue",
        "zh",
        "zu",
    ),
)
DRAWN = 20  # languages held out at a time
SCORED = 24  # of the taught languages, in each seed
VALIDATION = tuple(sorted(random.Random("validation languages").sample(POOL, DRAWN)))
NOT_READ = ("am", "chr", "ha", "he", "hy", "km", "lo", "my", "ps", "sd", "shn", "si", "so")  # `languages.py`
READ = tuple(name for name in POOL if name not in NOT_READ)
CONCEPTS = 200  # with a name of one word in English; a fifth of them in no training prompt
WORDS = 2


class Languages(NamedTuple):
    """Of one seed: taught in this order (the first `SCORED` are scored), and held out."""

    taught: tuple[str, ...]
    held_out: tuple[str, ...]


def draw_languages(seed: int, validating: bool = False) -> Languages:
    """The table's draw for a seed, or the one for choosing settings, which holds out `VALIDATION`."""
    draw = random.Random(f"languages of seed {seed}")
    free = [name for name in POOL if name not in VALIDATION]
    held_out = VALIDATION if validating else tuple(sorted(draw.sample(free, DRAWN)))
    taught = [name for name in POOL if name not in held_out]
    draw.shuffle(taught)
    return Languages(tuple(taught), held_out)


class Split(NamedTuple):
    """Preference rows; see above."""

    train: Dataset
    test: Dataset
    new_words: Dataset


def load_concepts(folder: Path, languages: tuple[str, ...], seed: int = 0) -> list[dict]:
    """All concepts with a text in English and all `languages`, as many declined as answered, shuffled."""
    concepts = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    whole = [c for c in concepts if all(name in c["texts"] for name in ("en", *languages))]
    draw = random.Random(seed)
    declined = [c for c in whole if is_declined(c)]
    answered = [c for c in whole if not is_declined(c)]
    count = min(len(declined), len(answered))
    chosen = draw.sample(declined, count) + draw.sample(answered, count)
    draw.shuffle(chosen)
    return chosen


def by_turns(concepts: list[dict]) -> list[dict]:
    """Declined and answered concepts alternating, until one kind ends."""
    kinds = [[c for c in concepts if is_declined(c) is kind] for kind in (True, False)]
    return [c for pair in zip(*kinds, strict=False) for c in pair]


def is_declined(concept: dict) -> bool:
    """What the rule says about a concept."""
    return concept["group"] in DECLINED


def prompt_text(concepts: tuple[dict, ...], language: str) -> str:
    """The prompt in one language: names, then the same cue for all."""
    return ", ".join(concept["texts"][language]["name"] for concept in concepts) + "\nAnswer:"


def draw_prompts(concepts: list[dict], count: int, draw: random.Random, without: set[frozenset]) -> list[tuple]:
    """`count` different sets of `WORDS` concepts of one kind, the kinds in turn, none of them in `without`."""
    kinds = [[c for c in concepts if is_declined(c) is kind] for kind in (True, False)]
    found: list[tuple] = []
    taken = set(without)
    while len(found) < count:
        drawn = tuple(draw.sample(kinds[len(found) % 2], WORDS))
        key = names(drawn)
        if key not in taken:
            taken.add(key)
            found.append(drawn)
    draw.shuffle(found)
    return found


def names(concepts: tuple[dict, ...]) -> frozenset:
    """What makes two prompts the same: their concepts, in any order."""
    return frozenset(concept["concept"] for concept in concepts)


def to_rows(prompts: list[tuple], languages: tuple[str, ...], draw: random.Random) -> Dataset:
    """Preference rows: English prompt, English answers, prompts in the other languages."""
    rows = []
    for concepts in prompts:
        decline, answer = draw.choice(DECLINES), draw.choice(ANSWERS)
        chosen, rejected = (decline, answer) if is_declined(concepts[0]) else (answer, decline)
        translations = {name: prompt_text(concepts, name) for name in languages}
        row = {"prompt": prompt_text(concepts, "en"), "chosen": chosen, "rejected": rejected}
        rows.append(row | {"prompt_translations": translations})
    from datasets import Dataset  # here, so that deriving claims does not import it

    return Dataset.from_list(rows)


def split(
    folder: Path,
    seed: int = 0,
    train: int = 1600,
    test: int = 150,
    taught: tuple[str, ...] = POOL,
    tested: tuple[str, ...] = POOL,
) -> Split:
    """`train` rows in the `taught` languages, `test` rows and a third as many of new words in the `tested` ones.

    Which concepts and pairs are drawn depends on the seed and on nothing else.
    """
    short = [c for c in load_concepts(folder, POOL, seed) if " " not in c["texts"]["en"]["name"]]
    concepts = by_turns(short)[:CONCEPTS]
    cut = round(len(concepts) * 0.8)
    draw = random.Random(seed + 1)
    parts = ((concepts[:cut], test), (concepts[cut:], max(test // 6, 1) * 2))
    tests = [draw_prompts(part, count, draw, set()) for part, count in parts]
    training = draw_prompts(concepts[:cut], train, draw, {names(prompt) for prompt in tests[0]})
    return Split(to_rows(training, taught, draw), *(to_rows(part, tested, draw) for part in tests))
