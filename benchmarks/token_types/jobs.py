"""One job: one model of this benchmark, quantized one way, and everything that is scored on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.token_types.methods import LEARNED, bits


SHORT_EPOCHS = 6  # of learned methods where a GPU cannot record steps: they would not end in time
SHIFTS = ("type_shift", "type_shift_scale")  # tables of the types beyond the first
PLACES = ("source", "texts", "pictures")  # entries of `measure` that say where something lies


@dataclass(frozen=True)
class Job:
    """One calibration and its scores.

    Args:
        model: `diffusion`, `vlm` or `three_types`.
        method: Name in the rows; `fp` is full precision, `train` makes the model.
        settings: The first is quantized; a second differs only in the cache's bits and shares its weights.
        quantize: Fields of `FreeActConfig` beside the bits; `times_samples` multiplies the calibration samples.
        measure: Sizes of calibration and scoring, of the world.
        folder: Where the model and its data lie.
    """

    model: str
    method: str
    settings: tuple[str, ...]
    seed: int
    quantize: dict
    measure: dict
    folder: str
    device: str = "cpu"
    threads: int | None = None
    group: str = "method"

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return f"{self.model} {self.method} {'+'.join(self.settings)} seed {self.seed}"

    @property
    def key(self) -> str:
        """Same for jobs that measure the same thing, wherever the files lie."""
        told = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("folder", "threads")}
        told["measure"] = {k: v for k, v in self.measure.items() if k not in PLACES}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `json.dumps(dataclasses.asdict(job))` wrote."""
        plain = json.loads(text)
        return cls(**{**plain, "settings": tuple(plain["settings"])})


def row(job: Job, setting: str, metric: str, value: float | None, note: str = "", **more: Any) -> dict:
    """One measurement."""
    head = {"model": job.model, "group": job.group, "method": job.method, "setting": setting, **more}
    return {**head, "metric": metric, "value": value, "seed": job.seed, **({"note": note} if note else {})}


def world(name: str):
    """The module that makes and scores a model."""
    from benchmarks.token_types import diffusion_world, vision_world

    return {"diffusion": diffusion_world, "vlm": vision_world, "three_types": vision_world}[name]


def perform(job: Job) -> list[dict]:
    """Run a job in this process; its rows."""
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    if job.group in ("time", "warm"):
        from benchmarks.token_types.timing import measure

        return [
            {**row(job, job.settings[0], told["metric"], told["value"]), **told}
            for told in measure(job.device, **job.measure)
        ]
    home = world(job.model)
    if job.method == "train":
        start = time.perf_counter()
        told = home.make(job.model, Path(job.folder), job.measure, job.device, job.seed)
        told["seconds"] = time.perf_counter() - start
        return [row(job, "w16a16", f"training_{name}", float(value)) for name, value in told.items()]
    data = torch.load(Path(job.folder) / "data.pt", weights_only=True)
    if job.method == "fp":
        from benchmarks.token_types.loudness import loudness

        model = home.load(Path(job.folder)).to(job.device)
        rows = [row(job, job.settings[0], **told) for told in loudness(model, data["calibration"])]
    else:
        model, rows = _quantize(job, home, data)
    for setting in job.settings:
        if setting != job.settings[0]:
            _change_cache(model, bits(setting)["kv_bits"])
        for score in home.score(model.eval(), data, job.measure, setting, job.folder):
            rows.append(row(job, setting, **score))
    if job.measure.get("validate"):  # never what a table shows
        rows.append(row(job, job.settings[-1], "validation_nll", home.validate(model, data, job.measure, job.folder)))
    return rows


def _quantize(job: Job, home: Any, data: dict):
    import torch

    from optimum_freeact import FreeActConfig
    from optimum_freeact.calibration.step_graph import can_record

    calibration = {k: job.measure[k] for k in ("n_samples", "seq_len", "batch_size") if k in job.measure}
    fields = dict(job.quantize)
    calibration["n_samples"] *= fields.pop("times_samples", 1)
    if job.device == "cuda" and job.method in LEARNED and not can_record():
        fields["epochs"] = SHORT_EPOCHS
    config = FreeActConfig(
        **{**calibration, **fields},
        **bits(job.settings[0]),
        seed=job.seed,
        dataset=data["calibration"],
        calibration_device=job.device,
        progress=False,
    )
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = home.load(
        Path(job.folder), quantization_config=config, device_map=None if job.device == "cpu" else {"": job.device}
    )
    seconds = time.perf_counter() - start
    model = model.to(job.device)
    told = model.hf_quantizer.quantization_config
    note = f"{', '.join(told.token_types)}"
    if told.calibration == "learned":
        note += f"; {told.epochs} epochs"
    rows = [row(job, job.settings[0], "calibration_seconds", round(seconds, 2), note)]
    if job.device == "cuda":
        rows.append(row(job, job.settings[0], "peak_gb", torch.cuda.max_memory_allocated() / 1e9))
    for metric, value in sizes(model).items():
        rows.append(row(job, job.settings[0], metric, value))
    for record in model.__dict__.get("_freeact_records", []) if job.group != "ablation" else []:  # many rows
        rows.append(row(job, job.settings[0], "output_error", record.output_error, block=record.block))
    return model, rows


def sizes(model: Any) -> dict[str, float]:
    """Bytes of the quantized linears over 16-bit ones, and what further types add to the whole model.

    Embeddings and other 16- or 32-bit floats outside the quantized modules count two bytes a number, as they are saved
    in practice.
    """
    from optimum_freeact.modules.activation import FreeActInput
    from optimum_freeact.modules.linear import FreeActLinear

    packed = plain = typed = 0
    own_columns: dict[int, int] = {}
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, (FreeActInput, FreeActLinear)):
            tensors = [*module.buffers(recurse=False), *module.parameters(recurse=False)]
            packed += sum(t.numel() * t.element_size() for t in tensors)
            inner |= {id(t) for t in tensors}
        if isinstance(module, FreeActLinear):
            plain += 2 * module.in_features * module.out_features
        for name in ("mean", "clip", "keep", *SHIFTS):
            table = module._buffers.get(name) if isinstance(module, (FreeActInput, FreeActLinear)) else None
            if table is not None:
                further = table if name in SHIFTS else table[1:]
                typed += further.numel() * further.element_size()
        if isinstance(module, FreeActInput) and module.uses is not None:  # columns that single types use, a byte each
            columns = int((~module.uses[1:].all(0)).sum()) if len(module.uses) > 1 else 0
            own_columns[id(module)] = columns
            typed += columns * module.in_features
        if isinstance(module, FreeActLinear):
            typed += own_columns.get(id(module.source), 0) * module.out_features
    others = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in inner}
    whole = packed + sum(2 * t.numel() for t in others.values())
    return {"size_ratio": packed / plain, "per_type_parameter_share": typed / whole}


def _change_cache(model: Any, kv_bits: int) -> None:
    """The same weights with another cache."""
    from optimum_freeact.modules.runtime import activate

    config = model.hf_quantizer.quantization_config
    config.kv_bits = kv_bits
    activate(model, config)
