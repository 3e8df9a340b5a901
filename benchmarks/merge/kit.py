"""What the donor's side of `adaptation.py` comes to, once per pair: texts in both tokenizations, lessons, transported weights.

A kit is a folder of a few ten megabytes, so the adaptation itself needs the target alone: on a machine without the donor,
its tokenizer or the texts. Lessons and weights of the random donors are made there from the donor's configuration.

    python benchmarks/merge/kit.py code french --out kit            # on the CPU; minutes per pair
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks.merge.texts import code_chunks, french_chunks  # noqa: E402
from mergekit_ot.anchors import MatchedText, match_text  # noqa: E402
from mergekit_ot.bundle import PlanBundle  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.planning import open_pair, record_pair  # noqa: E402
from mergekit_ot.settings import PlanSettings  # noqa: E402
from mergekit_ot.solve import rows_needed, solve_pair  # noqa: E402
from mergekit_ot.teacher import Lesson, prepare_lessons  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from mergekit_ot.vocabulary import vocabulary_plan  # noqa: E402
from tools.assets import fetch  # noqa: E402


@dataclass(frozen=True)
class Task:
    """A pair on a text: donor asset, and what it knows better than SmolLM2-135M."""

    donor: str
    chunks: Callable[[int], dict[str, list[str]]]


TASKS = {"code": Task("qwen2.5", code_chunks), "french": Task("gemma3-270m", french_chunks)}
TARGET = "smollm2"
#: Of the transported stream, every how-many-th matched row is kept.
STATE_STEP = 2
#: Continuations kept per position.
TOP = 32
#: A donor's own texts: samples per adaptation text, donor tokens of it they go on from, tokens added, likeliest choices
#: drawn from, samples computed together.
WRITINGS, PROMPT, WRITTEN, CHOICES, SIDE_BY_SIDE = 4, 24, 104, 64, 160
#: Target tokens kept of a text.
LENGTH = 160


@dataclass
class Kit:
    """Texts as both models see them; every seed adapts on a part of `train`."""

    calibration: list[MatchedText]
    train: list[MatchedText]
    valid: list[list[int]]
    scored: list[list[int]]
    vocabulary: torch.Tensor
    folder: Path
    task: str


def match_all(task: str, options: argparse.Namespace) -> Kit:
    """Choose and tokenize the texts of a task."""
    target, donor = fetch(TARGET), fetch(TASKS[task].donor)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (target, donor)]
    pair, chunks = open_pair(str(target), str(donor)), TASKS[task].chunks(0)
    wanted, calibration = 2 * rows_needed(pair.target, pair.donor), []
    for text in chunks["calibration"]:
        calibration.append(match_text(text, *tokenizers, max_length=128))
        if sum(len(one.target_rows) for one in calibration) >= wanted:
            break
    pieces = chunks["train"][: options.texts]
    train = [match_text(text, *tokenizers, max_length=options.length, skip=0) for text in pieces]

    def ids(name: str, count: int) -> list[list[int]]:
        coded = tokenizers[0](chunks[name][:count], truncation=True, max_length=options.length)["input_ids"]
        return [list(row) for row in coded]

    plan = vocabulary_plan(*tokenizers, pair.donor.vocab_size)
    return Kit(calibration, train, ids("valid", options.valid), ids("eval", options.scored), plan, Path(), task)


def save_kit(kit: Kit, folder: Path, donor: Path) -> None:
    """Write everything but what a donor's weights say."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "donor").mkdir(exist_ok=True)
    shutil.copy(donor / "config.json", folder / "donor" / "config.json")
    texts = {
        "calibration": [asdict(text) for text in kit.calibration],
        "train": [asdict(text) for text in kit.train],
        "valid": kit.valid,
        "scored": kit.scored,
    }
    (folder / "texts.json").write_text(json.dumps(texts))
    save_file({"vocabulary": kit.vocabulary.int()}, folder / "vocabulary.safetensors")


def load_kit(folder: Path) -> Kit:
    """Read a kit."""
    texts = json.loads((folder / "texts.json").read_text())
    calibration, train = ([MatchedText(**text) for text in texts[name]] for name in ("calibration", "train"))
    plan = load_file(folder / "vocabulary.safetensors")["vocabulary"].long()
    return Kit(calibration, train, texts["valid"], texts["scored"], plan, folder, folder.name)


# --- what a donor gives ---------------------------------------------------------------------------------------------
@dataclass
class Gift:
    """Lessons, transported weights by name, how the plans were solved; states are of every `STATE_STEP`-th row."""

    lessons: list[Lesson]
    weights: dict[str, torch.Tensor]
    plans: dict


#: Plans of stream and attention, the blocks the paper merges.
ATTENTION = PlanSettings(residual_map="procrustes", modules=("attn",))


def plans_of(
    kit: Kit, target: Path, donor: Path, device: str, settings: PlanSettings = ATTENTION
) -> tuple[PlanBundle, Transporter]:
    """Plans of a pair on the kit's calibration text."""
    pair = open_pair(str(target), str(donor))
    with tempfile.TemporaryDirectory() as scratch:
        stores = record_pair(pair, kit.calibration, Path(scratch), "kit", device=device, quiet=True)
        readers = CheckpointReader(target), CheckpointReader(donor)
        bundle = solve_pair(*stores, pair.target, pair.donor, settings, *readers, device=device, quiet=True)
    return bundle, Transporter(bundle, pair.target, pair.donor, *readers)


def load_donor(donor: Path, device: str):
    """A causal model to ask: in bfloat16 on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(donor, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return model.to(device).eval()


def teach(kit: Kit, target: Path, donor: Path, device: str) -> Gift:
    """Run a donor over all adaptation texts, no more: lessons without states, no weights, no plans but the vocabulary's."""
    size = open_pair(str(target), str(donor)).target.vocab_size
    return Gift(prepare_lessons(load_donor(donor, device), kit.train, kit.vocabulary, size, top=TOP), {}, {})


def take(kit: Kit, target: Path, donor: Path, device: str) -> Gift:
    """Run a donor over all adaptation texts and transport its attention weights."""
    bundle, transporter = plans_of(kit, target, donor, device)
    read, weights = CheckpointReader(target), {}
    for name in read.names():
        if ".self_attn." in name and name.endswith("_proj.weight"):
            moved = transporter.transport(name, read(name).float())
            if moved is not None:
                weights[name] = moved.float().cpu()
    model = load_donor(donor, device)
    stream_map = bundle.tensors["residual.to_target"]
    size = open_pair(str(target), str(donor)).target.vocab_size
    lessons = prepare_lessons(model, kit.train, kit.vocabulary, size, top=TOP, stream_map=stream_map)
    del model
    gc.collect()
    info = {"layers": sum(j is not None for j in bundle.layer_map), "residual": bundle.info["residual"]}
    lessons = [replace(one, states=one.states[::STATE_STEP]) for one in lessons]
    return Gift(lessons, weights, info | {"confidence": bundle.info["confidence"]})


@torch.no_grad()
def continuations(model, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """`WRITINGS` sampled continuations of every prompt (all of one length), prompt included, cut where the model ends."""
    device, texts = next(model.parameters()).device, []
    draw = torch.Generator(device).manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    every = torch.tensor(prompts, device=device).repeat_interleave(WRITINGS, dim=0)
    for ids in every.split(SIDE_BY_SIDE):
        step, cache = ids, None
        for _ in range(WRITTEN):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            likeliest = output.logits[:, -1].float().topk(min(CHOICES, output.logits.shape[-1]))
            chosen = torch.multinomial(likeliest.values.softmax(-1), 1, generator=draw)
            step = likeliest.indices.gather(-1, chosen)
            ids = torch.cat([ids, step], dim=-1)
        for row in ids.tolist():
            texts.append(row[: next((i for i in range(PROMPT, len(row)) if row[i] in ends), len(row))])
    return texts


def write_texts(kit: Kit, target: Path, donor: Path, tokenizers: list, device: str, seed: int = 0) -> Gift:
    """Let a donor go on from the first tokens of every adaptation text, and teach what it writes; `sources` says from which."""
    model, size = load_donor(donor, device), open_pair(str(target), str(donor)).target.vocab_size
    lessons, sources = [], []
    rows = continuations(model, [text.donor_ids[:PROMPT] for text in kit.train], seed)
    for i, row in enumerate(rows):
        text = match_text(tokenizers[1].decode(row, skip_special_tokens=True), *tokenizers, max_length=LENGTH, skip=0)
        made = prepare_lessons(model, [text], kit.vocabulary, size, top=TOP)
        lessons += made
        sources += [i // WRITINGS] * len(made)
    return Gift(lessons, {}, {"sources": sources})


def _int8(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows rounded to eight bits: an error of about half a percent, far below that of any plan."""
    scale = values.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return {"q": (values.float() / scale).round().to(torch.int8), "s": scale.half()}


def save_gift(gift: Gift, path: Path) -> None:
    """Write a donor's gift."""
    tensors = {f"weight.{name}.{k}": v for name, w in gift.weights.items() for k, v in _int8(w * 1024).items()}
    for i, lesson in enumerate(gift.lessons):
        parts = {"ids": lesson.ids.int(), "rows": lesson.rows.int(), "tokens": lesson.tokens.int()}
        parts |= {"probabilities": lesson.probabilities.half()}
        parts |= {f"states.{k}": v for k, v in _int8(lesson.states).items()} if lesson.states is not None else {}
        tensors |= {f"lesson.{i}.{name}": value.contiguous() for name, value in parts.items()}
    save_file(tensors, path, metadata={"plans": json.dumps(gift.plans)})


def load_gift(path: Path) -> Gift:
    """Read a donor's gift."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        plans = json.loads(file.metadata()["plans"])
    wide = {
        name[:-2]: tensors[name].float() * tensors[name[:-1] + "s"].float() for name in tensors if name.endswith(".q")
    }
    weights = {name.removeprefix("weight."): w / 1024 for name, w in wide.items() if name.startswith("weight.")}
    lessons = []
    for i in range(sum(name.endswith(".ids") for name in tensors)):
        ids, rows, tokens, probabilities = (
            tensors[f"lesson.{i}.{part}"] for part in ("ids", "rows", "tokens", "probabilities")
        )
        states = wide.get(f"lesson.{i}.states")
        lessons.append(Lesson(ids.long(), rows.long(), tokens.long(), probabilities.float(), states))
    return Gift(lessons, weights, plans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("kit"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--light", action="store_true", help="no plans: arms with transported weights or streams are left out"
    )
    for name, default in (("texts", 80), ("valid", 24), ("scored", 64), ("length", LENGTH)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for task in options.tasks:
        start, folder, donor = time.perf_counter(), options.out / task, fetch(TASKS[task].donor)
        if not (folder / "texts.json").is_file():  # texts that are there are kept: the donor alone may be elsewhere
            save_kit(match_all(task, options), folder, donor)
        kit = load_kit(folder)
        if options.light:
            if not (folder / "real.safetensors").is_file():
                save_gift(teach(kit, fetch(TARGET), donor, options.device), folder / "lessons.safetensors")
        else:
            save_gift(take(kit, fetch(TARGET), donor, options.device), folder / "real.safetensors")
        tokenizers = [AutoTokenizer.from_pretrained(path) for path in (fetch(TARGET), donor)]
        save_gift(write_texts(kit, fetch(TARGET), donor, tokenizers, options.device), folder / "written.safetensors")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
