"""Do two processes train as one when parameters are replicated or sharded? MLC-DPO in float32.

    python benchmarks/mlc/sharded.py                                # one process, then each mode on two GPUs
    python benchmarks/mlc/sharded.py --modes ddp --cpu --steps 2    # on a CPU with gloo

Every mode makes the same steps on the same rows; what is compared is the loss, the term and the gradient norm that each
step logs. A mode that fails is a row whose note holds the last line of its error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

COMPARED = ("loss", "mlc/loss", "grad_norm")
FSDP2 = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_state_dict_type=FULL_STATE_DICT", "--fsdp_reshard_after_forward=true"]
# With it, only the first process loads weights, and TRL 1.16 shards a reference model as each process has it
LOADING = "--fsdp_cpu_ram_efficient_loading="
ZERO = ["--use_deepspeed", "--zero_stage"]
MODES = {"ddp": [], "fsdp2": [*FSDP2, LOADING + "false"], "zero2": [*ZERO, "2"], "zero3": [*ZERO, "3"]}
MODES["fsdp2-efficient-loading"] = [*FSDP2, LOADING + "true"]
KINDS = {"fsdp": "FSDP", "zero": "DEEPSPEED"}  # what accelerate must have made of a mode
FIRST_PORT = 29611
LANGUAGES = ("es", "ru", "zh", "hi", "bn", "id", "tr", "ur", "sw", "am")


def deepspeed_config(stage: int) -> dict:
    """The least that ZeRO needs; the trainer fills in the rest."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def worker(options: argparse.Namespace) -> None:
    """Train in this process group and let the first process write what was logged."""
    from datasets import Dataset  # noqa: F401  (fails here, not in the middle, where it is missing)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.mlc.concepts import split
    from tools.assets import fetch
    from trl_mlc.dpo import MLCDPOConfig, MLCDPOTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = options.model if Path(options.model).is_dir() else str(fetch(options.model))
    data = split(fetch("concepts"), train=4 * options.steps, test=4, taught=LANGUAGES, tested=LANGUAGES).train
    lacking = {"ru": None, "tr": None}
    data = data.map(lambda r, i: {"prompt_translations": r["prompt_translations"] | (lacking if i % 3 else {})}, True)
    with tempfile.TemporaryDirectory() as scratch:
        extra = {"deepspeed": deepspeed_config(int(options.worker[-1]))} if options.worker.startswith("zero") else {}
        args = MLCDPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=4 // world,
            max_steps=options.steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=options.checkpointing,
            bf16=False,
            use_cpu=options.cpu,
            ddp_backend="gloo" if options.cpu and world > 1 else None,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
            mlc_layer=options.layer,
            mlc_every=1,
            mlc_buckets=1,
            mlc_languages_per_step=4,
            **extra,
        )
        model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for _ in range(2))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = MLCDPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(Path(scratch) / "final"))  # gathers the shards: part of what must work
        if trainer.accelerator.is_main_process:
            saved = sorted(path.name for path in (Path(scratch) / "final").iterdir())
            log = [{k: e[k] for k in COMPARED} for e in trainer.state.log_history if "mlc/loss" in e]
            found = {"log": log, "saved": saved, "processes": trainer.accelerator.num_processes}
            found["kind"] = trainer.accelerator.distributed_type.value
            options.record.write_text(json.dumps(found), encoding="utf-8")


def launch(mode: str, options: argparse.Namespace, log: Path) -> tuple[dict | None, str]:
    """Run one mode in fresh processes, on a port of its own; returns what it logged, or `None` and why."""
    if mode.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return None, "deepspeed is not installed here"
    own = [str(Path(__file__).resolve()), "--worker", mode, "--record", str(log), "--steps", str(options.steps)]
    own += ["--model", options.model, "--layer", str(options.layer)]
    own += ["--cpu"] * options.cpu + ["--checkpointing"] * options.checkpointing
    command = [sys.executable, *own]
    port = str(FIRST_PORT + list(MODES).index(mode)) if mode != "single" else ""
    if mode == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", port, *own]
    elif mode != "single":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
        command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port", port, *MODES[mode], *own]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": first} if mode == "single" else {})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=options.limit_seconds
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {options.limit_seconds:.0f} s"
    if done.returncode or not log.is_file():
        said = (done.stderr + done.stdout).splitlines()
        lines = [line for line in said if "Error" in line and "ChildFailedError" not in line]
        return None, (lines or ["no error line"])[-1].strip()[:300]
    found = json.loads(log.read_text(encoding="utf-8"))
    wanted = 1 if mode == "single" else 2
    if found["processes"] != wanted:
        return None, f"ran on {found['processes']} processes instead of {wanted}"
    kind = next((kind for start, kind in KINDS.items() if mode.startswith(start)), found["kind"])
    if found["kind"] != kind:
        return None, f"accelerate made it {found['kind']} instead of {kind}"
    return found, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--model", default="smollm2", help="asset name or folder")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--together", type=int, default=1, help="modes at a time, the single process among them")
    parser.add_argument("--limit-seconds", type=float, default=900, help="of each mode")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the result file goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from tools.result_files import RESULTS, command_line, write

    rows = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.together) as pool:
        jobs = {
            mode: pool.submit(launch, mode, options, Path(scratch) / f"{mode}.json")
            for mode in ("single", *options.modes)
        }
        alone, why = jobs["single"].result()
        if alone is None:
            raise SystemExit(f"The single process failed: {why}")
        for mode in options.modes:
            found, why = jobs[mode].result()
            for metric in COMPARED:
                row = {"mode": mode, "metric": f"relative_difference {metric}", "value": None}
                if found is None:
                    row["note"] = why
                else:
                    pairs = zip(found["log"], alone["log"], strict=True)
                    row["value"] = max(abs(a[metric] - b[metric]) / max(abs(b[metric]), 1e-12) for a, b in pairs)
                    row["saved"] = " ".join(found["saved"])
                rows.append(row)
                print(row, flush=True)
            write(
                "mlc_sharded", rows, "benchmarks.mlc.no_claims", command_line(), [0], folder=options.folder or RESULTS
            )


if __name__ == "__main__":
    main()
