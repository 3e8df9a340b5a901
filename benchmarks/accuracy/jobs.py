"""One job is one quantized model: what is measured, how it is planned, and the process that measures it.

    python -m benchmarks.accuracy.jobs < LINES

Each line names a job and where its result goes. A job on a CPU gets a process of its own, so that its peak of memory is
its own; on a GPU, whose peak can be set back, a process takes one job after the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.claims import CPU_COST, FP
from benchmarks.accuracy.scoring import is_finite, score_windows
from optimum_freeact.presets import PRESETS


SCHEMES = ("w4a16", "w4a8", "w4a4", "w4a4kv4")
# characters of each text: calibration comes from the first range, evaluation starts at the second
SLICES = {"handbook": ((0, 300_000), 600_000), "brown": ((0, 600_000), 4_000_000)}
# where variants are scored from which one is chosen: behind what is calibrated on, before what is evaluated on
VALIDATION = {"handbook": 320_000, "brown": 1_000_000}
CHARS_PER_TOKEN = 12  # more than any tokenizer here makes of English: how much of the text is read for the windows
ABLATIONS: tuple[tuple[str, Any], ...] = (
    ("centring", "none"),
    ("centring", "shared"),
    ("token_types", ["text"]),
    ("channel_scale", "closed_form"),
    ("transform", "none"),
    ("transform", "kronecker"),
    ("low_rank", 0),
    ("low_rank", 8),
    ("low_rank", 32),
    ("low_rank_budget", None),
    ("rounding", "rtn"),
    ("rounding_passes", 0),
    ("rounding_order", "columns"),
    ("rounding_noise", False),
    ("rounding_shrinkage", True),
    ("rounding_refit", True),
    ("sequential", True),
    ("error_correction", True),
    ("loudness_limit", 2.0),
    ("activation_symmetric", True),
    ("activation_clip", 1.0),
    ("weight_clip", 1.0),
    ("weight_group_size", None),
    ("weight_group_size", 64),
    ("weight_group_size", 16),
    ("activation_group_size", None),
    ("activation_group_size", 64),
    ("activation_group_size", 32),
)
OF_OTHERS = (  # presets, each with one field changed
    ("freeact-fast", "rounding_shrinkage", True),
    ("freeact-fastest", "transform", "kronecker"),
    ("freeact-fastest", "channel_scale", "closed_form"),
)
CORRECTED, LIMITED = {"error_correction": True}, {"loudness_limit": 2.0}
FASTEST = {"preset": "freeact-fastest"}
KRONECKER, SCALED = {"transform": "kronecker"}, {"channel_scale": "closed_form"}
# of the presets, decided on validation text (`run.py --variants`); each with the constants of the package that it changes, by name.
# The first ones are measured with every seed before the others begin.
FIRST_VARIANTS = 4
VARIANTS: tuple[tuple[str, dict, dict], ...] = (
    ("freeact", {}, {}),
    ("freeact loudness_limit=2.0", LIMITED, {}),
    ("freeact-fastest", FASTEST, {}),
    ("freeact-fastest transform=kronecker", {**FASTEST, **KRONECKER}, {}),
    ("freeact error_correction=True", CORRECTED, {}),
    ("freeact-fastest channel_scale=closed_form", {**FASTEST, **SCALED}, {}),
    ("freeact-fastest transform=kronecker channel_scale=closed_form", {**FASTEST, **KRONECKER, **SCALED}, {}),
    ("freeact-fastest loudness_limit=2.0", {**FASTEST, **LIMITED}, {}),
    ("freeact error_correction=True loudness_limit=2.0", {**CORRECTED, **LIMITED}, {}),
    ("freeact rounding_refit=True", {"rounding_refit": True}, {}),
    ("freeact rounding_passes=4", {"rounding_passes": 4}, {}),
    ("freeact damping=0.002", {"damping": 0.002}, {}),
    ("freeact-fastest error_correction=True", {**FASTEST, **CORRECTED}, {}),
)
CLAIMED = ("freeact", "freeact-fast", "freeact-learned", "flatquant", "quarot")
GRIDS = (None, 64, 32, 16)  # of the sweep: group sizes of weights times those of activations
RANKS = (0, 4, 8, 12, 20, 24, 32)
PASSES = (0, 1, 4)
# As published: weights first, columns as they come, no rounding noise in the moments. The others are ours to beat: columns
# by energy, moments behind everything that is quantized, with the rounding noise in them.
PUBLISHED = {"preset": "quarot", "sequential": True, "rounding_order": "columns", "rounding_noise": False}
GROUPS = {"preset": "quarot", "weight_group_size": 32, "activation_group_size": 16, "activation_clip": "search"}
QUAROTS: dict[str, dict] = {
    "quarot-search": {"preset": "quarot", "activation_clip": "search"},
    "quarot-asym": {"preset": "quarot", "activation_symmetric": False},
    "quarot-asym-search": {"preset": "quarot", "activation_symmetric": False, "activation_clip": "search"},
    "quarot-published": PUBLISHED,
    "quarot-published-asym": {**PUBLISHED, "activation_symmetric": False},
    "quarot-groups": GROUPS,
    "quarot-groups-asym": {**GROUPS, "activation_symmetric": False},
}


@dataclass(frozen=True)
class Text:
    """A text file and the ranges of it that calibration and evaluation read."""

    name: str
    path: str
    calibration: tuple[int, int]
    evaluation: int

    def __post_init__(self):
        if not 0 <= self.calibration[0] < self.calibration[1] <= self.evaluation:
            raise ValueError(
                f"Text {self.name!r}: calibration reads characters {self.calibration}, evaluation those from "
                f"{self.evaluation}; they must not overlap."
            )

    def for_choosing(self) -> Text:
        """The same text, scored where no claim is: for choices between variants."""
        return dataclasses.replace(self, evaluation=min(VALIDATION[self.name], self.evaluation))

    def read_calibration(self) -> str:
        """The characters to calibrate on."""
        start, stop = self.calibration
        return Path(self.path).read_text(encoding="utf-8")[start:stop]

    def read_evaluation(self, n_tokens: int) -> str:
        """The held-out characters, at least enough for so many tokens where the text has them."""
        return Path(self.path).read_text(encoding="utf-8")[self.evaluation :][: n_tokens * CHARS_PER_TOKEN]


@dataclass(frozen=True)
class Job:
    """One calibration and what is scored after it.

    Args:
        model: Key of the model in rows and claims.
        group: `full`, `preset`, `ablation`, `peer` or `cpu_cost`.
        method: Name in the rows.
        settings: The first is quantized; a second differs from it only in the cache's bits and shares its weights.
        quantize: Fields of `FreeActConfig` beside the bits; `{"peer": name}` for a peer; empty for full precision.
        measure: `samples`, `seq_len`, `batch_size`, `windows`, `window`, and `score` (False: cost only).
        rank: Small ones are started first.
    """

    model: str
    group: str
    method: str
    settings: tuple[str, ...]
    seed: int
    quantize: dict
    measure: dict
    model_path: str
    texts: tuple[Text, ...]
    device: str = "cpu"
    threads: int | None = None
    rank: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return f"{self.model} {self.method} {'+'.join(self.settings)} seed {self.seed}"

    @property
    def is_learned(self) -> bool:
        """Whether it takes gradient steps: minutes, where closed forms take seconds."""
        preset = PRESETS.get(self.quantize.get("preset", ""), {})
        return {**preset, **self.quantize}.get("calibration") == "learned"

    @property
    def key(self) -> str:
        """Same for jobs that measure the same thing, wherever the files lie."""
        plain = dataclasses.asdict(self)
        for text in plain["texts"]:
            text.pop("path")
        told = {k: v for k, v in plain.items() if k not in ("model_path", "threads", "rank", "note")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `json.dumps(dataclasses.asdict(job))` wrote."""
        plain = json.loads(text)
        texts = tuple(Text(**{**t, "calibration": tuple(t["calibration"])}) for t in plain.pop("texts"))
        return cls(**{**plain, "settings": tuple(plain["settings"]), "texts": texts})


def bits(setting: str) -> dict[str, int]:
    """`w4a4kv4` as fields of the config."""
    found = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?", setting)
    if found is None:
        raise ValueError(f"A setting is like w4a16, w4a8, w4a4 or w4a4kv4, got {setting!r}.")
    weight, activation, cache = found.groups()
    return {"weight_bits": int(weight), "activation_bits": int(activation), "kv_bits": int(cache or 16)}


# ---------------------------------------------------------------- planning
class Rank:
    """Which jobs start first. Learned ones, of which only some run at a time, come before all others: they take longest."""

    FULL = 0
    LEARNED, LEARNED_RIVALS, LEARNED_ELSEWHERE, LEARNED_MORE = 1, 2, 3, 4
    CLAIMED, PRESET, MORE, ABLATION = 5, 6, 7, 8


def _rank(method: str, learned: bool, main: bool, first: bool) -> int:
    """Of a preset's job: `main` is W4A4, `first` the first seed."""
    if not learned:
        return Rank.CLAIMED if main and method in CLAIMED else Rank.PRESET
    if not main:
        return Rank.LEARNED_ELSEWHERE
    if first:
        return Rank.LEARNED
    return Rank.LEARNED_RIVALS if method == "flatquant" else Rank.LEARNED_MORE


@dataclass
class Plan:
    """Collects the jobs of one model."""

    common: dict
    schemes: tuple[str, ...]
    seeds: list[int]
    measure: dict
    learned: dict  # fields that learned calibrations change (epochs, n_samples), by "quantize", "measure", "elsewhere" than W4A4
    learned_schemes: tuple[str, ...] | None = None  # default: all
    only: set[str] | None = None
    later_seeds: tuple[int, ...] = ()  # of the default and of QuaRot, after all else that claims need
    jobs: list[Job] = field(default_factory=list)

    def add(self, group: str, method: str, settings: tuple[str, ...], seed: int, quantize: dict, **more: Any) -> None:
        """Add a job unless `only` leaves its method out."""
        if settings and (self.only is None or method in self.only or group in self.only):
            measure = {**self.measure, **more.pop("measure", {})}
            self.jobs.append(Job(**self.common, **more, **_job(group, method, settings, seed, quantize, measure)))

    def full_precision(self) -> None:
        """What everything is compared with; always there."""
        self.jobs.append(Job(**self.common, **_job("full", FP[0], (FP[1],), self.seeds[0], {}, self.measure)))

    def presets(self) -> None:
        """All presets at all schemes, what claims are about with every seed; the cache is left out again on the weights of
        the same calibration.
        """
        methods = {name: {"preset": name} for name in PRESETS}
        methods["freeact-learned"] = {"preset": "freeact", "calibration": "learned"}
        for method, quantize in methods.items():
            learned = {**PRESETS[quantize["preset"]], **quantize}["calibration"] == "learned"
            quantize = {**quantize, **(self.learned["quantize"] if learned else {})}
            for settings in self._settings(self.learned_schemes if learned else None):
                main = "w4a4" in settings
                more = {}
                if learned:
                    measure = self.learned["measure" if main or "elsewhere" not in self.learned else "elsewhere"]
                    samples = measure.get("n_samples", self.measure.get("n_samples"))
                    more = {"measure": measure, "note": f"learned on {samples} samples"}
                for seed in self.seeds if main and method in CLAIMED else self.seeds[:1]:
                    rank = _rank(method, learned, main, seed == self.seeds[0])
                    self.add("preset", method, settings, seed, quantize, rank=rank, **more)
                if main and method in ("freeact", "quarot"):
                    for seed in self.later_seeds:
                        self.add("preset", method, settings, seed, quantize, rank=Rank.MORE, **more)

    def _settings(self, allowed: tuple[str, ...] | None) -> list[tuple[str, ...]]:
        """Schemes, those that differ only in the cache's bits together."""
        together: dict[tuple, list[str]] = {}
        for scheme in (scheme for scheme in self.schemes if allowed is None or scheme in allowed):
            one = bits(scheme)
            together.setdefault((one["weight_bits"], one["activation_bits"]), []).append(scheme)
        return [tuple(sorted(group, key=lambda s: bits(s)["kv_bits"])) for group in together.values()]

    def quarots(self, widths: list[int]) -> None:
        """QuaRot as published, strengthened, and on grids as fine as ours: the strongest is what we compare with."""
        for seed in (*self.seeds, *self.later_seeds) if "w4a4" in self.schemes else ():
            rank = Rank.CLAIMED if seed in self.seeds else Rank.MORE
            for method, quantize in QUAROTS.items():
                if _divides(quantize, widths):
                    self.add("preset", method, ("w4a4",), seed, quantize, rank=rank)

    def ablations(self, widths: list[int]) -> None:
        """`freeact` at W4A4 with one field changed; what is the preset's own value or does not divide is left out."""
        if "w4a4" not in self.schemes:
            return
        from optimum_freeact.config_fields import DEFAULTS

        for preset, name, value in (*(("freeact", *change) for change in ABLATIONS), *OF_OTHERS):
            if value != {**DEFAULTS, **PRESETS[preset]}[name] and _divides({name: value}, widths):
                shown = f"{preset} {name}={'+'.join(value) if isinstance(value, list) else value}"
                quantize = {"preset": preset, name: value}
                self.add("ablation", shown, ("w4a4",), self.seeds[0], quantize, rank=Rank.ABLATION)

    def sweep(self, widths: list[int]) -> None:
        """What decided the default: all pairs of group sizes, ranks, passes."""
        grids = [{"weight_group_size": w, "activation_group_size": a} for w in GRIDS for a in GRIDS]
        changes = [*grids, *({"low_rank": rank} for rank in RANKS), *({"rounding_passes": n} for n in PASSES)]
        for change in changes:
            if _divides(change, widths):
                method = " ".join(("freeact", *(f"{name}={value}" for name, value in change.items())))
                self.add("sweep", method, ("w4a4",), self.seeds[0], {"preset": "freeact", **change})

    def variants(self) -> None:
        """The default and what may follow it, scored on validation text."""
        self.common = {**self.common, "texts": tuple(text.for_choosing() for text in self.common["texts"])}
        self.measure = {**self.measure, "divergence": True}
        self.full_precision()
        for seed in self.seeds:
            for place, (method, change, constants) in enumerate(VARIANTS):
                measure = {"constants": constants} if constants else {}
                quantize = {"preset": "freeact", **change}
                rank = int(place >= FIRST_VARIANTS)
                self.add("variant", method, ("w4a4",), seed, quantize, measure=measure, rank=rank)

    def default_samples(self) -> None:
        """`freeact` at W4A4 on as few samples as the library takes by default (those of the time on a CPU)."""
        from optimum_freeact.config_fields import DEFAULTS

        fewer = {name: DEFAULTS[name] for name in ("n_samples", "seq_len")}
        if "w4a4" in self.schemes and all(self.measure[name] > value for name, value in fewer.items()):
            method = "freeact samples=" + "x".join(map(str, fewer.values()))
            self.add(
                "ablation", method, ("w4a4",), self.seeds[0], {"preset": "freeact"}, measure=fewer, rank=Rank.ABLATION
            )

    def peers(self) -> None:
        """Published packages."""
        from benchmarks.accuracy.peers import PEERS

        for name, peer in PEERS.items():
            if peer.setting in self.schemes:
                note = f"{peer.package}: {peer.about}"
                self.add("peer", name, (peer.setting,), self.seeds[0], {"peer": name}, rank=Rank.PRESET, note=note)

    def cpu_cost(self) -> None:
        """Time and memory of the default closed-form calibration."""
        measure = {"score": False}
        self.add(CPU_COST, "freeact", ("w4a4",), self.seeds[0], {"preset": "freeact"}, measure=measure)


def _divides(quantize: dict, widths: list[int]) -> bool:
    sizes = [size for name, size in quantize.items() if name.endswith("group_size") and size is not None]
    return all(width % size == 0 for width in widths for size in sizes)


def _job(group: str, method: str, settings: tuple[str, ...], seed: int, quantize: dict, measure: dict) -> dict:
    names = ("group", "method", "settings", "seed", "quantize", "measure")
    return dict(zip(names, (group, method, settings, seed, quantize, measure), strict=True))


# ---------------------------------------------------------------- measuring
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


def _row(job: Job, setting: str, metric: str, value: float | None, note: str = "", **more: Any) -> dict:
    row = {"model": job.model, "group": job.group, "method": job.method, "setting": setting, **more}
    note = "; ".join(part for part in (job.note, note) if part)
    return {**row, "metric": metric, "value": value, "seed": job.seed, **({"note": note} if note else {})}


def absent(job: Job, reason: str) -> list[dict]:
    """The rows of a job that gave none: no value, and why."""
    measure = job.measure
    if not measure.get("score", True):
        return [_row(job, job.settings[0], "calibration_seconds", None, reason)]
    n_tokens = measure["windows"] * (measure["window"] - 1)
    return [
        _row(job, setting, "nll", None, reason, text=text.name, n_tokens=n_tokens)
        for setting in job.settings
        for text in job.texts
    ]


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
    return model, rows + [_row(job, setting, "size_ratio", _size_ratio(model)) for setting in job.settings]


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
    return model, [*rows, _row(job, job.settings[0], "size_ratio", size, "linears inside the decoder blocks, as ours")]


def _cost_rows(job: Job, seconds: float, note: str) -> list[dict]:
    gigabytes, source = peak_gb(job.device)
    device = f"{job.device}, {job.threads} threads" if job.device == "cpu" and job.threads else job.device
    told = (("calibration_seconds", round(seconds, 3), f"{note}; {device}"), ("peak_gb", round(gigabytes, 4), source))
    return [_row(job, setting, *one) for setting in job.settings for one in told]


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
            rows.append(_row(job, setting, "nll", score.nll, text=text.name, n_tokens=score.n_tokens))
        else:
            rows.append(_row(job, setting, "nll", None, f"the loss is {score.nll}", text=text.name))
        if exact is not None:
            score = score if here is not None else score_windows(model, _windows(chosen, tokenizer, measure), exact)
            note = "mean KL(full precision || quantized), nats a token, on validation text"
            rows.append(_row(job, setting, "divergence", score.divergence, note, text=text.name))
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
