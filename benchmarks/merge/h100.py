"""Time and memory of an 8B-shaped donor into a 1B-shaped target on one GPU; random weights, only cost is measured.

    python benchmarks/merge/h100.py

Needs one GPU with 24 GB, 45 GB of disk under --scratch, 40 GB of memory; neither mergekit nor POT. `--tiny` runs the same
steps on tiny shapes and any device, to see that it works.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from mergekit_ot.anchors import MatchedText  # noqa: E402
from mergekit_ot.checkpoint import CheckpointReader  # noqa: E402
from mergekit_ot.planning import open_pair, record_pair  # noqa: E402
from mergekit_ot.settings import PlanSettings  # noqa: E402
from mergekit_ot.solve import rows_needed, solve_pair  # noqa: E402
from mergekit_ot.transport import interpolate  # noqa: E402
from mergekit_ot.transporter import Transporter  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


SHAPES = {
    "target": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "donor": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": True}
TINY = {
    "target": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 8},
    "donor": {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 6, "head_dim": 16},
}


def build(folder: Path, shape: dict, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON, **shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def random_texts(rows: int, length: int = 256) -> list[MatchedText]:
    """The same random tokens on both sides; every position after the third is matched."""
    draw = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(-(-rows // (length - 3))):
        ids = torch.randint(0, COMMON["vocab_size"], (length,), generator=draw).tolist()
        where = list(range(3, length))
        texts.append(MatchedText(ids, ids, where, where))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shapes, on_gpu, times = TINY if options.tiny else SHAPES, options.device.startswith("cuda"), {}
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        for seed, (side, shape) in enumerate(shapes.items()):
            build(folder / side, shape, seed, options.device)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pair = open_pair(str(folder / "target"), str(folder / "donor"))
        clock = time.perf_counter()

        def lap(step: str) -> None:
            nonlocal clock
            if on_gpu:
                torch.cuda.synchronize()
            times[step], clock = time.perf_counter() - clock, time.perf_counter()
            print(step, round(times[step], 1), "s", flush=True)

        texts = random_texts(int(1.1 * rows_needed(pair.target, pair.donor)))
        stores = record_pair(pair, texts, folder / "rows", "h100", device=options.device, quiet=True)
        lap("activations")
        readers = CheckpointReader(folder / "target"), CheckpointReader(folder / "donor")
        settings = PlanSettings(residual_map="procrustes", solver="entropic")
        bundle = solve_pair(*stores, pair.target, pair.donor, settings, *readers, device=options.device, quiet=True)
        bundle.save(folder / "plans")
        lap("plans")
        transporter, merged = Transporter(bundle, pair.target, pair.donor, *readers), {}
        for name in readers[0].names():
            tensor = readers[0](name).to(options.device)
            transported = transporter.transport(name, tensor)
            merged[name] = (tensor if transported is None else interpolate(tensor, transported, 0.05)).cpu()
        save_file(merged, folder / "merged.safetensors")
        lap("merge")
        assert all(torch.isfinite(tensor).all() for tensor in merged.values())
        moved = sum(not torch.equal(tensor, readers[0](name)) for name, tensor in merged.items())
    peak = {"value": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {"value": None, "note": "not on a GPU"}
    rows = [{"step": step, "metric": "seconds", "value": value} for step, value in times.items()]
    rows += [
        {"step": "all", "metric": "peak device GB", **peak},
        {"step": "plans", "metric": "bundle GB", "value": bundle.bytes() / 1e9},
        {"step": "merge", "metric": "tensors changed", "value": moved},
    ]
    rows = [{"shapes": "tiny" if options.tiny else "8b to 1b", **row} for row in rows]
    name = "merge_h100_tiny" if options.tiny else "merge_h100"
    print(write(name, rows, "benchmarks.merge.h100_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
