"""Use each package once, for real, on models made here; `tools/package.py` runs this file in fresh environments.

    python first_use.py optimum_freeact trl_mlc mergekit_ot

It imports nothing of the repository, so that what is used is what was installed. For each package it looks up every public
name, then quantizes, saves, loads and generates; trains two steps with the consistency loss, saves and loads; or checks,
runs and loads a merge. Without a package it only names the versions. The last line printed is one JSON object: seconds per package, and the versions found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path


HOSTS = (
    "torch", "transformers", "accelerate", "safetensors", "trl", "datasets", "mergekit", "POT", "peft",
    "numpy", "hf-concord",
)  # fmt: skip
WORDS = "alpha beta gamma delta plan cost mass neuron layer head stream donor target merge width depth".split()


def tokenizer():
    """A byte tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    return made


def model(folder: Path, seed: int, width: int = 32) -> Path:
    """A tiny Llama with weights that matter, as an ordinary checkpoint folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def texts(count: int = 500, length: int = 12) -> list[str]:
    """Sentences of a few words and numbers."""
    draw = random.Random(0)
    return [" ".join(f"{draw.choice(WORDS)}{draw.randrange(30)}" for _ in range(length)) for _ in range(count)]


def look_up(package: str) -> None:
    """Every public name, from a package that is installed and says that it is typed."""
    module = importlib.import_module(package)
    place = Path(module.__file__).parent
    assert "site-packages" in str(place), f"{package} is not the installed one but {place}"
    assert (place / "py.typed").is_file(), f"{package} has no py.typed"
    for name in module.__all__:
        getattr(module, name)


def optimum_freeact(folder: Path) -> None:
    """Quantize while loading, save, load, generate: the same tokens before and after."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import optimum_freeact

    source = model(folder / "model", seed=0)
    (folder / "texts.txt").write_text("\n".join(texts(200)))
    words = AutoTokenizer.from_pretrained(source)
    settings = optimum_freeact.FreeActConfig(
        dataset=str(folder / "texts.txt"), tokenizer=words, n_samples=8, seq_len=64, kv_bits=4, progress=False
    )
    ids = words("alpha beta gamma", return_tensors="pt")["input_ids"]
    chosen = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    quantized = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    first = quantized.generate(ids, **chosen)
    quantized.save_pretrained(folder / "w4")
    again = AutoModelForCausalLM.from_pretrained(folder / "w4").generate(ids, **chosen)
    assert torch.equal(first, again), "the reloaded model says something else"
    assert first.shape[1] == ids.shape[1] + 8


def trl_mlc(folder: Path) -> None:
    """Two steps of DPO with the consistency loss: it is reported, weights move, the checkpoint loads."""
    import math

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_mlc import MLCDPOConfig, MLCDPOTrainer

    source = model(folder / "model", seed=1)
    rows = [
        {"prompt": f"say {word}", "chosen": " yes", "rejected": " never",
         "prompt_translations": {"sw": word[::-1], "de": f"{word}{word}"}}
        for word in WORDS
    ]  # fmt: skip
    args = MLCDPOConfig(
        output_dir=str(folder / "out"), mlc_weight=0.8, mlc_layer=2, max_steps=2, per_device_train_batch_size=4,
        logging_steps=1, report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, gradient_checkpointing=False,
    )  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(source)
    trainer = MLCDPOTrainer(
        AutoModelForCausalLM.from_pretrained(source),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    trainer.train()
    losses = [entry["mlc/loss"] for entry in trainer.state.log_history if "mlc/loss" in entry]
    assert losses, "no mlc/loss was logged"
    assert all(map(math.isfinite, losses)), losses
    trainer.save_model(str(folder / "aligned"))
    after = AutoModelForCausalLM.from_pretrained(folder / "aligned").state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())


def mergekit_ot(folder: Path) -> None:
    """A donor of another width into a target, by the command's own functions; the result loads."""
    from transformers import AutoModelForCausalLM

    from mergekit_ot.cli import main

    model(folder / "target", seed=2)
    model(folder / "donor", seed=3, width=48)
    (folder / "texts.txt").write_text("\n".join(texts(700)))
    (folder / "recipe.yml").write_text(
        "merge_method: transport\nbase_model: target\nmodels: [{model: target}, {model: donor}]\n"
        "parameters: {alpha: 0.1, gate: 'off'}\ncalibration: {dataset: texts.txt, samples: 256}\n"
    )
    for command in (["check"], ["run"]):
        words = [*command, str(folder / "recipe.yml"), *([str(folder / "merged")] if command == ["run"] else [])]
        assert main(words) == 0, f"mergekit-ot {' '.join(words)} failed"
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    target = AutoModelForCausalLM.from_pretrained(folder / "target").state_dict()
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in target.items()}
    assert any(not merged[name].equal(tensor) for name, tensor in target.items())


def versions() -> dict[str, str]:
    """What is installed of the hosts."""
    found = {"python": sys.version.split()[0]}
    for name in HOSTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(packages: list[str]) -> None:
    """Use the named packages; a failure is raised as it is."""
    warnings.simplefilter("ignore")
    seconds = {}
    for package in packages:
        start = time.perf_counter()
        look_up(package)
        with tempfile.TemporaryDirectory() as folder:
            {"optimum_freeact": optimum_freeact, "trl_mlc": trl_mlc, "mergekit_ot": mergekit_ot}[package](Path(folder))
        seconds[package] = round(time.perf_counter() - start, 1)
    print(json.dumps({"seconds": seconds, "versions": versions()}))


if __name__ == "__main__":
    main(sys.argv[1:])
