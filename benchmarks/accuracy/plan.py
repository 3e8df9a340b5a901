"""Which jobs there are: every preset at every setting, the strongest QuaRot, ablations, sweeps, variants and peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.accuracy.claims import CPU_COST, FP
from benchmarks.accuracy.jobs import Job, bits
from optimum_freeact.presets import PRESETS


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
