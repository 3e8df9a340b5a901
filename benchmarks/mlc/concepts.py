"""A rule taught in English only: which things to talk about, and which to decline.

Everyday concepts have a name in over a hundred languages (CLDR). A prompt names two concepts of one kind; the rule
goes by their kind: living and edible things are declined, places and objects are answered. Chosen and rejected answers
come from the same sentences with their parts swapped, so declining always, answering always, or preferring any one
sentence scores 0.5.

Languages: `POOL` is every language for which CLDR names (nearly) all concepts, in one script each: a hundred. `VALIDATION`, a
fifth of them drawn once, are the only ones that settings are chosen by. Every seed of the table draws another fifth, of the
rest, to hold out, and teaches all that are left: so held-out languages are many, were not picked by anyone, and were not
seen when anything was chosen. Eleven of the twenty have relatives: `RELATED` has the branches (genera of the World Atlas of
Language Structures) that at least four languages of the pool write in one script, and a third of a group at most is held
out, so that each keeps three taught relatives. Nine are drawn from `OTHERS`, which have fewer or none. The first are scored
as `held_out`, the others as `held_out_far`, both together as `held_out_all`.

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
RELATED = {
    "Slavic, Latin": "pl cs sk sl hr bs hsb dsb",
    "Slavic, Cyrillic": "ru uk be bg mk sr",
    "Romance, Latin": "es pt fr it ca gl ro rm",
    "Germanic, Latin": "de nl af sv no da fo is",
    "Turkic, Latin": "tr az tk uz",
    "Turkic, Cyrillic": "kk ky ba cv",
    "Indic, Devanagari": "hi mr ne kok",
}
OTHERS = (
    "ak am ar as bn chr cy el et eu fa fi fil ga gd gu ha he hu hy id ig ja jv ka km kn ko lo lt lv ml mn ms my om "
    "or pa pcm ps qu sd shn si so sq sw ta te th ti to ur vi yo yue zh zu"
)
GROUPS = {name: tuple(names.split()) for name, names in RELATED.items()}
POOL = tuple(sorted([*OTHERS.split(), *(name for names in GROUPS.values() for name in names)]))
DRAWN = 20  # languages held out at a time
SCORED = 24  # of the taught languages, in each seed
VALIDATION = tuple(sorted(random.Random("validation languages").sample(POOL, DRAWN)))
CONCEPTS = 200  # with a name of one word in English; a fifth of them in no training prompt
WORDS = 2


class Languages(NamedTuple):
    """Of one seed: taught in this order (the first `SCORED` are scored); held out, with relatives and without."""

    taught: tuple[str, ...]
    related: tuple[str, ...]
    far: tuple[str, ...]


def draw_languages(seed: int, validating: bool = False) -> Languages:
    """The table's draw for a seed, or the one for choosing settings, which holds out `VALIDATION`."""
    draw = random.Random(f"languages of seed {seed}")
    others = OTHERS.split()
    if validating:
        related, far = ([name for name in VALIDATION if (name in others) is alone] for alone in (False, True))
    else:
        related = [name for names in GROUPS.values() for name in draw_related(names, draw)]
        far = draw.sample([name for name in others if name not in VALIDATION], DRAWN - len(related))
    taught = [name for name in POOL if name not in {*related, *far}]
    draw.shuffle(taught)
    return Languages(tuple(taught), tuple(sorted(related)), tuple(sorted(far)))


def draw_related(names: tuple[str, ...], draw: random.Random) -> list[str]:
    """One of four or five relatives, two of six to eight; never one that settings are chosen by."""
    free = [name for name in names if name not in VALIDATION]
    return draw.sample(free, min(len(names) // 3, 2))


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
    words: int = CONCEPTS,
) -> Split:
    """`train` rows in the `taught` languages, `test` rows and a third as many of new words in the `tested` ones, all of `words` concepts.

    Which concepts and pairs are drawn depends on the seed and on nothing else.
    """
    short = [c for c in load_concepts(folder, POOL, seed) if " " not in c["texts"]["en"]["name"]]
    concepts = by_turns(short)[:words]
    cut = round(len(concepts) * 0.8)
    draw = random.Random(seed + 1)
    parts = ((concepts[:cut], test), (concepts[cut:], max(test // 6, 1) * 2))
    tests = [draw_prompts(part, count, draw, set()) for part, count in parts]
    training = draw_prompts(concepts[:cut], train, draw, {names(prompt) for prompt in tests[0]})
    return Split(to_rows(training, taught, draw), *(to_rows(part, tested, draw) for part in tests))
