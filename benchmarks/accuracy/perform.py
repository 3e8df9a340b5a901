"""The process that measures: one job after the other.

    python -m benchmarks.accuracy.perform < LINES

Each line names a job and where its result goes. A job on a CPU gets a process of its own, so that its peak of memory is
its own; on a GPU, whose peak can be set back, a process takes one job after the other.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.jobs import Job, Text, bits, row
from benchmarks.accuracy.scoring import is_finite, score_windows


def perform(job: Job) -> list[dict]:
    """Run a job in this process; its rows."""
    import torch
    from transformers import AutoTokenizer

    if job.threads:
        torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokenizer = AutoTokenizer.from_pretrained(job.model_path)
    _set_constants(job.measure.get("constants", {}))
    if job.group == "full":
        model, rows = _load(job, "float32"), []
    elif "peer" in job.quantize:
        model, rows = _quantize_peer(job, tokenizer)
    else:
        model, rows = _quantize(job, tokenizer)
    for setting in job.settings if job.measure.get("score", True) else ():
        if setting != job.settings[0]:
            _change_cache(model, bits(setting)["kv_bits"])
        rows += _score(job, setting, model.eval(), tokenizer)
    return rows


_constants: dict[str, Any] = {}  # as the package has them


def _set_constants(wanted: dict[str, Any]) -> None:
    """Give constants of the package, by name, these values, and all others their own."""
    for name in {**_constants, **wanted}:
        module, _, constant = name.rpartition(".")
        module = importlib.import_module(f"optimum_freeact.{module}")
        own = _constants.setdefault(name, getattr(module, constant))
        setattr(module, constant, wanted.get(name, own))


def _load(job: Job, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model_path, dtype=getattr(torch, dtype)).to(job.device)


def _calibration_texts(job: Job) -> list[str]:
    return [text.read_calibration() for text in job.texts]


def _quantize(job: Job, tokenizer):
    """The model quantized through `from_pretrained`, and the rows about its size and cost."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_freeact import FreeActConfig

    settings = {name: job.measure[name] for name in ("n_samples", "seq_len", "batch_size") if name in job.measure}
    config = FreeActConfig(
        **job.quantize,
        **bits(job.settings[0]),
        **settings,
        seed=job.seed,
        dataset=_calibration_texts(job),
        tokenizer=tokenizer,
        calibration_device=job.device,
        progress=False,
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job.model_path,
        dtype=torch.float32,
        quantization_config=config,
        device_map=None if job.device == "cpu" else {"": job.device},
    )
    seconds = time.perf_counter() - start
    record = model.hf_quantizer.quantization_config.calibration_record
    rows = _cost_rows(job, seconds, f"whole from_pretrained; blocks alone {record['seconds']} s")
    return model, rows + [row(job, setting, "size_ratio", _size_ratio(model)) for setting in job.settings]


def _quantize_peer(job: Job, tokenizer):
    """The model with a peer's linears; the peer's own way of quantizing is timed, loading is not."""
    from benchmarks.accuracy.peers import PEERS, decoder_linears, module_bytes
    from optimum_freeact.calibration.data import load_samples

    peer = PEERS[job.quantize["peer"]]
    if job.device not in peer.devices:
        raise RuntimeError(f"runs on {', '.join(peer.devices)} only, this is {job.device}")
    model = _load(job, peer.dtype).eval()
    linears = decoder_linears(model)
    plain = sum(2 * linear.weight.numel() for linear in linears.values())
    samples = load_samples(
        _calibration_texts(job), tokenizer, job.measure["n_samples"], job.measure["seq_len"], job.seed
    )
    start = time.perf_counter()
    peer.apply(model, list(linears), samples)
    rows = _cost_rows(job, time.perf_counter() - start, "quantizing alone")
    changed = [name for name in linears if type(model.get_submodule(name)) is not type(linears[name])]
    changed += [
        n for n in linears if n not in changed and type(model.get_submodule(n).weight.data).__name__ != "Tensor"
    ]
    if len(changed) != len(linears):
        raise RuntimeError(f"quantized {len(changed)} of {len(linears)} linears")
    size = sum(module_bytes(model.get_submodule(name)) for name in linears) / plain
    return model, [*rows, row(job, job.settings[0], "size_ratio", size, "linears inside the decoder blocks, as ours")]


def _cost_rows(job: Job, seconds: float, note: str) -> list[dict]:
    gigabytes, source = peak_gb(job.device)
    device = f"{job.device}, {job.threads} threads" if job.device == "cpu" and job.threads else job.device
    told = (("calibration_seconds", round(seconds, 3), f"{note}; {device}"), ("peak_gb", round(gigabytes, 4), source))
    return [row(job, setting, *one) for setting in job.settings for one in told]


def peak_gb(device: str) -> tuple[float, str]:
    """Peak memory of this process in 1e9 bytes, and what was read: CUDA's allocator, or the resident set.

    `VmHWM` and not `getrusage`: the latter also counts the process that started this one.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9, "torch.cuda.max_memory_allocated"
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024 / 1e9, "VmHWM of the process"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, "getrusage ru_maxrss of the process"


def _size_ratio(model) -> float:
    """Bytes of all tensors of quantized modules over two bytes for each weight that they replace."""
    from optimum_freeact import FreeActInput, FreeActLinear

    modules = [m for m in model.modules() if isinstance(m, (FreeActInput, FreeActLinear))]
    stored = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
    return stored / sum(2 * m.in_features * m.out_features for m in modules if isinstance(m, FreeActLinear))


def _change_cache(model, kv_bits: int) -> None:
    """The same weights with another cache: they do not depend on it (a test holds this), only its own means do."""
    from optimum_freeact.modules.runtime import activate

    config = model.hf_quantizer.quantization_config
    config.kv_bits = kv_bits
    activate(model, config)


def _score(job: Job, setting: str, model, tokenizer) -> list[dict]:
    rows, measure = [], job.measure
    wanted = measure.get("divergence") and job.group != "full" and setting == job.settings[0]
    exact = _load(job, "float32").eval() if wanted else None
    for text in job.texts:
        chosen = text.for_choosing()
        here = exact if chosen == text else None  # one pass gives both where both are of the same text
        score = score_windows(model, _windows(text, tokenizer, measure), here)
        if is_finite(score):
            rows.append(row(job, setting, "nll", score.nll, text=text.name, n_tokens=score.n_tokens))
        else:
            rows.append(row(job, setting, "nll", None, f"the loss is {score.nll}", text=text.name))
        if exact is not None:
            score = score if here is not None else score_windows(model, _windows(chosen, tokenizer, measure), exact)
            note = "mean KL(full precision || quantized), nats a token, on validation text"
            rows.append(row(job, setting, "divergence", score.divergence, note, text=text.name))
    return rows


def _windows(text: Text, tokenizer, measure: dict):
    from optimum_freeact import tokenize_windows

    read = text.read_evaluation(measure["windows"] * measure["window"])
    return tokenize_windows(read, tokenizer, measure["window"], measure["windows"])


def serve(lines: Iterable[str]) -> None:
    """Do the job of each line, `{"job": ..., "result": path}`, and write its rows or its error to the path."""
    _share_memory()
    for line in lines:
        asked = json.loads(line)
        job = Job.from_json(json.dumps(asked["job"]))
        try:
            told: dict = {"rows": perform(job)}
        except Exception as error:  # whatever it is, the run goes on without this job and lists it
            import traceback

            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        result = Path(asked["result"])
        scratch = result.with_suffix(".part")
        scratch.write_text(json.dumps(told), encoding="utf-8")
        scratch.replace(result)
        _tidy(job.device)


MEMORY_SHARE = "ACCURACY_MEMORY_SHARE"  # environment variable; set it where several runs share a GPU


def _share_memory() -> None:
    """Keep to this process's part of the GPU: at the limit PyTorch gives kept memory back before it asks for more."""
    import torch

    share = os.environ.get(MEMORY_SHARE)
    if share is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(float(share))


def _tidy(device: str) -> None:
    """Leave nothing of a job to the next one."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve(sys.stdin)
