"""Fetch or make what the recipes beside this file name, under `work/`.

python examples/merge/prepare.py code        # both models and code text, for code.yml and stock.yml
python examples/merge/prepare.py relative    # a short fine-tune of SmolLM2-135M on a handbook (else Brown), then widened twofold
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mergekit_ot.relatives import widened  # noqa: E402
from tools.assets import fetch, fetch_prose  # noqa: E402


WORK = Path(__file__).parent / "work"
STEPS, BATCH, LENGTH, RATE = 16, 4, 128, 1e-4


def link(name: str) -> Path:
    place = WORK / name
    if not place.exists():
        place.symlink_to(fetch(name), target_is_directory=True)
    return place


def code() -> None:
    from benchmarks.merge.texts import code_chunks

    link("smollm2")
    link("qwen2.5")
    with (WORK / "code.jsonl").open("w") as file:
        for text in code_chunks()["calibration"]:
            file.write(json.dumps({"text": text}) + "\n")


def relative() -> None:
    target = link("smollm2")
    lines = [line for line in fetch_prose().read_text(encoding="utf-8").splitlines() if len(line) > 200]
    train, held_out = lines[:-300], lines[-300:]
    (WORK / "handbook.txt").write_text("\n".join(train) + "\n")
    (WORK / "handbook-eval.txt").write_text("\n".join(held_out) + "\n")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32),
        AutoTokenizer.from_pretrained(target),
    )
    finetune(model, tokenizer, train)
    config, state = widened(model.config, model.state_dict())
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wide.load_state_dict(state)
    wide.save_pretrained(WORK / "widened-finetune")
    tokenizer.save_pretrained(WORK / "widened-finetune")
    print(
        f"the donor has {wide.num_parameters() / 1e6:.0f}M parameters, the target {model.num_parameters() / 1e6:.0f}M"
    )


def finetune(model, tokenizer, lines: list[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        optimiser.zero_grad()
        total = 0.0
        for i in torch.randint(0, len(lines), (BATCH,), generator=draw).tolist():
            ids = tokenizer(lines[i], truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
            loss = model(input_ids=ids, labels=ids).loss / BATCH
            loss.backward()
            total += float(loss.detach())
        optimiser.step()
        print(f"step {step + 1}/{STEPS}, loss {total:.3f}", flush=True)
    model.eval()


if __name__ == "__main__":
    makers = {"code": code, "relative": relative}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "what", choices=makers, help="the models and texts of code.yml and stock.yml, or of relative.yml"
    )
    make = makers[parser.parse_args().what]
    WORK.mkdir(exist_ok=True)
    make()
