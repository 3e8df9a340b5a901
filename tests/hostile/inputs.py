"""Strategies and damage shared by the fuzzed surfaces."""

import json
import random
import struct

from hypothesis import strategies as st


#: Text as a file or a command line can hold it.
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
numbers = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2**63, -(2**63), float("nan"), float("inf"), 1e-320, 1e308]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
nasty_paths = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "../..",
        "~",
        "a\nb",
        "no-such-file",
        "no-such-org/no-such-model",
        "/dev/null",
        "/proc/self/mem",
    ]
    + [
        "../../escape",
        "$(touch escape)",
        "x" * 300,
        "ä/ö",
        "C:\\temp",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x",
        "a\0b",
    ]
)


def mapping(known: dict[str, st.SearchStrategy], unknown: st.SearchStrategy = anything) -> st.SearchStrategy[dict]:
    """Dictionaries over some of the known keys, each with a fitting value or anything at all, at times a stray key."""
    stray = st.one_of(st.just({}), st.just({}), st.just({}), st.dictionaries(words, unknown, max_size=1))

    @st.composite
    def build(draw):
        names = draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=6))
        wild = draw(st.sampled_from([*names, None, None])) if names else None
        chosen = {name: draw(anything if name == wild else known[name]) for name in names}
        return chosen | draw(stray)

    return build()


def damaged_safetensors(data: bytes, seed: int) -> bytes:
    """A safetensors file with something wrong in its header, its length or its size."""
    draw = random.Random(seed)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(6)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 3, 20])):
            flipped[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2**63, 2**64 - 1])) + header + body
    if kind == 3:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    entries = json.loads(header)
    name = draw.choice([key for key in entries if key != "__metadata__"])
    if kind == 4:
        key = draw.choice(["dtype", "shape", "data_offsets"])
        choices = {
            "dtype": ["F16", "BF16", "I64", "F8_E4M3", "U8", "BOOL", "X1", 7, None],
            "shape": [[], [0], [1, 2, 3], [-1], [2**62, 4], None, "all"],
            "data_offsets": [[0, 0], [0, 2**40], [8, 4], [-4, 4], [0], None],
        }
        entries[name][key] = draw.choice(choices[key])
    else:
        other = draw.choice(["", "weight", name + ".x", "../../escape", "model.layers.99.mlp.up_proj.weight"])
        value = entries.pop(name)
        if draw.random() < 0.7:
            entries[other] = value
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def damaged_json(text: str, seed: int, keys: tuple[str, ...] = ()) -> str:
    """A JSON object with a value changed, dropped or doubled, or text that is no JSON any more.

    `keys` names the objects inside the document that are preferred as victims.
    """
    draw = random.Random(seed)
    if draw.random() < 0.15:
        return text[: draw.randrange(len(text))]
    if draw.random() < 0.1:
        spot = draw.randrange(len(text))
        return text[:spot] + draw.choice('{}[],:"\\x') + text[spot + 1 :]
    document = json.loads(text)
    inner = [document[key] for key in keys if isinstance(document.get(key), dict)]
    victim = draw.choice(inner) if inner and draw.random() < 0.7 else document
    name = draw.choice(sorted(victim))
    values = [None, True, 0, -1, 7, 10**30, 0.5, float("nan"), "", "many", [], [1], {}, {"a": 1}, ["x", None]]
    action = draw.randrange(4)
    if action == 0:
        del victim[name]
    elif action == 1:
        victim[name + "_"] = victim[name]
    else:
        victim[name] = draw.choice(values)
    return json.dumps(document)
