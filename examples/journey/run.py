"""Merge, align, quantize, chat: three packages, four steps, each an ordinary checkpoint that the next one loads.

    python examples/journey/run.py                    # SmolLM2-135M and Qwen2.5-0.5B, small settings, minutes on two cores
    python examples/journey/run.py --scale 8          # as many times more text, steps and samples
    python examples/journey/run.py --target FOLDER --donor FOLDER --text FILE --rows FILE.jsonl

Every step that is finished is kept: the same command goes on where it stopped. It ends in one page, journey.md, with the
figures and pictures of every step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.arguments import existing  # noqa: E402
from tools.assets import fetch, fetch_prose  # noqa: E402


PROMPTS = ("What is the capital of France?", "Name three colours.")
LANGUAGES = ("de", "es", "fr")


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; everything has a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=existing, help="model that is written (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--donor", type=existing, help="model that gives (default: Qwen2.5-0.5B-Instruct)")
    parser.add_argument(
        "--text", type=existing, help="text for plans, calibration and scores (default: handbook or Brown)"
    )
    parser.add_argument(
        "--rows", type=existing, help="preference rows with prompt_translations (default: from CLDR names)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "journey", help="folder of all steps")
    parser.add_argument(
        "--scale", type=int, default=1, help="multiplies text, steps and samples (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    return parser.parse_args(arguments)


def split_text(source: Path, out: Path) -> tuple[Path, Path]:
    """One paragraph a line; the first three quarters to calibrate on, the rest held out."""
    text = source.read_text(encoding="utf-8").strip()
    parts = text.split("\n\n") if "\n\n" in text else text.splitlines()  # paragraphs, or one a line already
    lines = [line for part in parts if len(line := " ".join(part.split())) > 40]
    if len(lines) < 8:
        raise SystemExit(f"{source} has {len(lines)} paragraphs of more than 40 characters; at least 8 are needed.")
    cut = len(lines) * 3 // 4
    paths = out / "calibration.txt", out / "held-out.txt"
    for path, part in zip(paths, (lines[:cut], lines[cut:])):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def ask(words: dict) -> str:
    """A prompt about one concept, by its name and keywords in one language."""
    return f"{words['name']}: {', '.join(words['keywords'][:3])}\nAnswer:"


def concept_rows(count: int, held_out: bool) -> list[dict]:
    """Decline animals and food, answer about the rest: English pairs with prompts in other languages.

    Every seventh concept of each kind is held out of training.
    """
    concepts = json.loads((fetch("concepts") / "concepts.json").read_text(encoding="utf-8"))
    declined = ("Animals & Nature", "Food & Drink")
    kinds = [[c for c in concepts if (c["group"] in declined) is kind] for kind in (True, False)]
    kinds = [[c for i, c in enumerate(kind) if (i % 7 == 1) is held_out][:count] for kind in kinds]
    rows = []
    for concept in (c for pair in zip(*kinds) for c in pair):
        sides = " Sorry, I cannot talk about this.", " Sure, here is what I know."
        prompts = {name: ask(concept["texts"][name]) for name in ("en", *LANGUAGES)}
        first = concept["group"] not in declined
        rows.append(
            {
                "prompt": prompts.pop("en"),
                "chosen": sides[first],
                "rejected": sides[not first],
                "prompt_translations": prompts,
            }
        )
    return rows


def save(path: Path, value: object) -> None:
    """Write JSON, readably."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(*command: str | Path) -> None:
    """One command of ours, as a user would give it, in a process of its own so that its memory is given back."""
    words = [str(word) for word in command]
    print(f"\n$ {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-W", "ignore", "-m", *words], check=True, cwd=ROOT)


def merge(target: Path, donor: Path, text: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Step 1: transport a little of the donor into the target, and score it beside its controls."""
    import yaml

    recipe = {
        "merge_method": "transport",
        "base_model": str(target),
        "models": [{"model": str(target)}, {"model": str(donor)}],
        # exact plans of neurons are solved on the CPU, entropic ones where the model is
        "parameters": {"alpha": 0.05, "solver": "auto" if options.device == "cpu" else "entropic"},
        "calibration": {"dataset": str(text), "samples": min(256 * options.scale, 1024), "max_length": 96},
        "dtype": "bfloat16",
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    where = ["--device", options.device] if options.device != "cpu" else []
    run("mergekit_ot", "run", folder / "recipe.yml", folder / "1-merged", "--plans", folder / "plans", *where)
    return folder / "1-merged"


def align(model: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Step 2: a preference taught in English, with prompts in other languages; LoRA, folded into the weights."""
    out, data = folder / "2-aligned", folder / "rows.jsonl"
    common = ["--model_name_or_path", model, "--dataset_name", folder / "test.jsonl", "--dtype", "float32"]
    common += ["--device", options.device]
    run("trl_mlc.cli", "evaluate", *common, "--output", folder / "before.json")
    # more steps are smaller ones: it is not to go further, which costs likelihood, but with less noise
    rate = 5e-4 / options.scale
    words = f"""--output_dir {folder / "2-adapter"} --max_steps {30 * options.scale} --learning_rate {rate} --mlc_every 1
        --per_device_train_batch_size 8 --mlc_weight 1 --mlc_center common --mlc_signed true --mlc_contrast 1
        --mlc_anchor_detached true --mlc_extractor_dim 0 --mlc_scan_prompts 24 --warmup_steps 3 --use_peft --lora_r 16 --lora_target_modules all-linear --report_to none --logging_steps 4
        --gradient_checkpointing false --dtype float32 --save_steps {10 * options.scale} --resume_from_checkpoint last"""
    words += " --bf16 false --use_cpu" if options.device == "cpu" else ""
    run("trl_mlc.cli", "dpo", "--model_name_or_path", model, "--dataset_name", data, *words.split())
    fold(model, folder / "2-adapter", out)
    common[1] = out
    figure = ["--before", folder / "before.json", "--figure", folder / "languages.png"]
    run("trl_mlc.cli", "evaluate", *common, "--output", folder / "after.json", *figure)
    return out


def fold(model: Path, adapter: Path, out: Path) -> None:
    """Write an ordinary checkpoint of a model and its adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), adapter)
    whole.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def quantize(model: Path, text: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Step 3: weights, activations and cache of 4 bits."""
    out = folder / "3-quantized"
    samples = ["--n-samples", 8 * options.scale, "--seq-len", 256, "--kv-bits", 4, "--device", options.device]
    run("optimum_freeact.cli", "quantize", model, out, "--dataset", text, "--resume-dir", folder / "blocks", *samples)
    return out


def score_and_chat(
    folders: dict[str, Path], text: Path, folder: Path, seconds: dict[str, float], options: argparse.Namespace
) -> list[dict]:
    """Step 4: perplexity on held-out text and short answers of every step's model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import optimum_freeact  # noqa: F401 - makes transformers know the quantized one
    from optimum_freeact import score_text, tokenize_windows

    rows = []
    for name, place in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(options.device).eval()
        windows = tokenize_windows(text.read_text(encoding="utf-8"), tokenizer, 256, 4 * options.scale)
        score, answers = score_text(model, windows.to(options.device)), []
        for prompt in PROMPTS if tokenizer.chat_template else ():
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            made = model.generate(**ids.to(options.device), max_new_tokens=24, do_sample=False)
            answers.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        rows.append({"model": name, "nll": score.nll, "bytes": size, "seconds": seconds.get(name), "answers": answers})
        save(folder / "steps.json", rows)
    return rows


def draw(rows: list[dict], folder: Path) -> None:
    """Loss and size after every step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="tight")
    for axes, key, scale, label in zip(
        figure.subplots(1, 2), ("nll", "bytes"), (1, 1e6), ("nats a token, held out", "MB of weights")
    ):
        axes.barh([row["model"] for row in rows], [row[key] / scale for row in rows], color="#3366aa")
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "steps.png", dpi=140)


def verdicts(rows: list[dict], before: dict, after: dict) -> list[str]:
    """What each step did, good or bad, in one line each."""
    found = {row["model"].partition("-")[2]: row for row in rows}
    merged = found["merged"]["nll"] - found["target"]["nll"]
    aligned, lost = (
        found[name]["nll"] - found[last]["nll"] for name, last in (("aligned", "merged"), ("quantized", "aligned"))
    )
    means = [report["overall"]["mean_accuracy"] for report in (before, after)]
    return [
        f"- merging: held-out loss {merged:+.4f} nats; the donor's weights {'help' if merged < 0 else 'do not help'} on this text",
        f"- aligning: preference {means[0]:.3f} -> {means[1]:.3f}, mean of all languages, at {aligned:+.4f} nats; by language below",
        f"- quantizing: {lost:+.4f} nats, {found['quantized']['bytes'] / found['aligned']['bytes']:.3f} of the file's bytes",
    ]


def page(rows: list[dict], folder: Path) -> Path:
    """The one page of results."""
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    lines = [
        "# The journey",
        "",
        "| model | nll, held out | weights | seconds of the step |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        shown = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {row['model']} | {row['nll']:.4f} | {row['bytes'] / 1e6:.1f} MB | {shown} |")
    lines += ["", *verdicts(rows, before, after), "", "![Loss and size after every step](steps.png)", ""]
    lines += ["## Preference in every language", ""]
    lines += ["| language | accuracy before | after |", "| --- | ---: | ---: |"]
    for name, found in before["languages"].items():
        lines.append(f"| {name} | {found['accuracy']:.3f} | {after['languages'][name]['accuracy']:.3f} |")
    lines += ["", "![Before and after, by language](languages.png)", "", "## Answers", ""]
    for number, prompt in enumerate(PROMPTS):
        said = [f"- {row['model']}: {' '.join(row['answers'][number].split())}" for row in rows if row["answers"]]
        lines += [f"**{prompt}**", "", *said, ""] if said else []
    lines += ["The merge is judged beside its controls by `mergekit-ot eval recipe.yml 1-merged`; see its report.", ""]
    (folder / "journey.md").write_text("\n".join(lines), encoding="utf-8")
    return folder / "journey.md"


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not done yet and write the page."""
    options = read_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out.resolve()
    target = (options.target or fetch("smollm2")).resolve()
    donor = (options.donor or fetch("qwen2.5")).resolve()
    calibration, held_out = split_text(options.text or fetch_prose(), folder)
    for name, count, held_out_rows in (
        ("rows", 40 * options.scale, False),
        ("test", 16 * min(options.scale, 4), True),
    ):
        text = options.rows.read_text() if options.rows else None
        rows = concept_rows(count, held_out_rows) if text is None else [json.loads(line) for line in text.splitlines()]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    steps = {
        "1-merged": lambda: merge(target, donor, calibration, folder, options),
        "2-aligned": lambda: align(folder / "1-merged", folder, options),
        "3-quantized": lambda: quantize(folder / "2-aligned", calibration, folder, options),
    }
    command = "python examples/journey/run.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    save(folder / "settings.json", {"command": command, "scale": options.scale, "device": options.device})
    took = folder / "seconds.json"
    seconds = json.loads(took.read_text()) if took.is_file() else {}
    for name, step in steps.items():
        if not (folder / name / "config.json").is_file():
            start = time.perf_counter()
            step()
            seconds[name] = round(time.perf_counter() - start, 1)
            save(took, seconds)
    models = {"0-target": target, **{name: folder / name for name in steps}}
    rows = score_and_chat(models, held_out, folder, seconds, options)
    draw(rows, folder)
    done = page(rows, folder)
    print(f"\n{done.read_text()}\n{done}")
    return done


if __name__ == "__main__":
    main()
