"""Find launch settings of the Triton kernels on this GPU, for `FREEACT_LAUNCHES` or for `kernels/launches.py`.

    python -m benchmarks.speed.tune --out DIR --compile-only [--workers 16]
    python -m benchmarks.speed.tune --out DIR [--seconds 90]

The first compiles all candidates in parallel into Triton's cache; the second checks the kernels against the reference,
measures the candidates one by one, writes `tune.jsonl` (one line each) as it goes and at the end `launches.json`: for each
kernel and range of rows the settings with the least geometric mean over three shapes of an 8B model.
"""
# ruff: noqa: B023

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.speed.timing import copies_for, graph_microseconds, kept
from optimum_freeact.kernels import dp4a_triton, reference, rounding_triton, w4_triton
from optimum_freeact.kernels.launches import DEFAULTS
from optimum_freeact.kernels.tables import InputTables
from tests.freeact.kernels.cases import input_side, random_weight, rows_of, to


SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
# kernel, rows at most, rows measured, changes to the settings of launches.py
CANDIDATES: tuple[tuple[str, int | None, int, tuple[dict, ...]], ...] = (
    ("round", 4, 1, (
        {}, {"chunk": 128}, {"chunk": 512}, {"elements": 128}, {"finish_warps": 8}, {"correct_warps": 8},
        {"chunk": 128, "project_warps": 2, "correct_warps": 2}, {"chunk": 512, "project_warps": 8},
    )),
    ("w4", None, 2048, (
        {}, {"warps": 8}, {"stages": 3}, {"BM": 64}, {"BN": 64}, {"BM": 256, "warps": 8, "stages": 3},
        {"BM": 64, "BN": 256, "warps": 8}, {"BK": 128, "stages": 2}, {"BM": 256, "BN": 64}, {"GROUP": 4}, {"GROUP": 16},
        {"BK": 32, "stages": 5}, {"BN": 256, "warps": 8, "stages": 3},
    )),
    ("round", None, 2048, (
        {}, {"rows": 16}, {"rows": 64}, {"parts": 2}, {"fill": 528}, {"chunk": 256}, {"project_warps": 8},
        {"elements": 128}, {"elements": 512}, {"correct_warps": 8}, {"correct_rows": 32}, {"programs": 396},
        {"programs": 1584}, {"finish_warps": 8}, {"finish_warps": 2}, {"chunk": 64},
    )),
    ("pass", None, 2048, ({}, {"warps": 4, "registers": 255}, {"programs": 528}, {"ahead": True}, {"stages": 2})),
    ("pass_hopper_64", None, 2048, (
        {}, {"deep": 1}, {"registers": 80}, {"soon": True}, {"workers": 2}, {"ahead": False},
    )),
    ("pass_hopper_128", None, 2048, (
        {}, {"workers": 1, "deep": 1}, {"soon": False}, {"ahead": False}, {"deep": 1}, {"registers": 120},
    )),
    ("w4", 16, 16, (
        {}, {"BN": 32, "BK": 256}, {"BN": 32, "warps": 2, "stages": 5}, {"BK": 256, "stages": 3},
        {"BN": 16, "BK": 256, "warps": 2}, {"BN": 128}, {"stages": 6},
    )),
    ("stream", 16, 16, (
        {}, {"whole": 9.0}, {"room": 100_000, "registers": 80}, {"depth": 2}, {"depth": 7}, {"room": 64_000, "registers": 80},
    )),
    ("dp4a", 1, 1, ({}, {"words": 1024, "warps": 2}, {"words": 8192}, {"words": 8192, "warps": 8}, {"words": 16384, "warps": 8})),
    ("dp4a", None, 4, ({}, {"words": 4096}, {"words": 1024}, {"words": 2048, "warps": 4})),
)  # fmt: skip
PDL_ROWS = (1, 16)  # whole linears measured with and without programmatic dependent launch


class Bench:
    """Tensors of all shapes, made on demand on the device and kept."""

    def __init__(self, device: str):
        self.device = device

    @kept
    def side(self, d: int, rank: int = 24) -> InputTables:
        return to(input_side(d, rank=rank, channel=False).tables, self.device)

    @kept
    def rows(self, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, d, device=self.device) * torch.exp(torch.randn(d, device=self.device))
        return x.bfloat16(), torch.randint(0, 2, (n,), device=self.device)

    @kept
    def rounded(self, n: int, d: int) -> reference.Rows:
        codes = torch.randint(-8, 8, (n, d), dtype=torch.int8, device=self.device)
        stats = torch.stack((torch.rand(n), torch.randn(n), torch.zeros(n))).to(self.device)
        stats[2] = codes.sum(1)
        branch = torch.randn(n, 32, device=self.device)
        branch[:, 24:] = 0
        return reference.Rows(codes, stats, branch)

    @kept
    def weight(self, m: int, d: int, copy: int) -> reference.Weight:  # noqa: ARG002  (a copy is a tensor of its own)
        packed = torch.randint(0, 256, (m, d // 2), dtype=torch.uint8, device=self.device)
        row_sum = ((packed & 15).int() + (packed >> 4).int() - 16).sum(1, dtype=torch.int32)
        return to(random_weight(m, 16, rank=24), self.device)._replace(packed=packed, row_sum=row_sum)

    def call(self, kernel: str, n: int, d: int, m: int, options: dict, copy: int = 0):
        """One launch."""
        if kernel == "round":
            return rounding_triton.round_rows(*self.rows(n, d), self.side(d), options=options)
        if kernel.startswith("pass"):
            d = {"pass_hopper_64": 4096, "pass_hopper_128": 14336}.get(kernel, d)  # of other widths it has no say
            name = "rounding_pass_triton" if kernel == "pass" else "rounding_pass_hopper"
            module = import_module(f"optimum_freeact.kernels.{name}")
            return module.round_rows(*self.rows(n, d), self.side(d, 0), options=options)
        options = dict(options)
        if "words" in options:
            options["BN"] = max(1, min(16, options.pop("words") // (1 << (d // 8 - 1).bit_length())))
        if kernel == "stream":  # made for one GPU, by another compiler
            from optimum_freeact.kernels import w4_stream as module
        else:
            module = {"w4": w4_triton, "dp4a": dp4a_triton}[kernel]
        given = (self.rounded(n, d), self.rows(n, d)[1], self.weight(m, d, copy), torch.bfloat16)
        return module.w4_linear(*given, options=options)

    def linear(self, n: int, d: int, m: int, pdl: bool, copy: int = 0):
        """Rounding and product one after the other."""
        x, types = self.rows(n, d)
        rows = rounding_triton.round_rows(x, types, self.side(d), options={"pdl": pdl})
        product = dp4a_triton if n <= 4 else w4_triton
        return product.w4_linear(rows, types, self.weight(m, d, copy), torch.bfloat16, options={"pdl": pdl})


def jobs(bench: Bench, shapes) -> list[tuple[dict, list]]:
    """Labels and calls of everything to measure."""
    found = []
    for kernel, most, n, changes in CANDIDATES:
        for number, change in enumerate(changes):
            for d, m in shapes:
                labels = {
                    "what": "candidate",
                    "kernel": kernel,
                    "most": most,
                    "n": n,
                    "k": d,
                    "m": m,
                    "number": number,
                }
                copies = 1 if n > 16 or kernel == "round" else copies_for(m * d // 2)
                calls = [lambda a=(kernel, n, d, m, change), c=c: bench.call(*a, c) for c in range(copies)]
                found.append(({**labels, **change}, calls))
    for n in PDL_ROWS:
        for d, m in shapes:
            for pdl in (False, True):
                labels = {"what": "pdl", "kernel": "linear", "n": n, "k": d, "m": m, "pdl": pdl}
                copies = range(copies_for(m * d // 2))
                found.append((labels, [lambda a=(n, d, m, pdl), c=c: bench.linear(*a, c) for c in copies]))
    return found


def choose(rows: list[dict], shapes) -> dict[str, list]:
    """The settings with the least mean logarithm of time, among those that ran at all shapes."""
    found: dict[str, list] = {}
    pdl = [
        sum(math.log(r["us"]) for r in rows if r["what"] == "pdl" and r["pdl"] is on and "us" in r)
        for on in (False, True)
    ]
    counts = [sum(r["what"] == "pdl" and r["pdl"] is on and "us" in r for r in rows) for on in (False, True)]
    correct = all("failed" not in r and r["w4_y"] < 0.05 for r in rows if r["what"] == "check" and r["pdl"])
    complete = counts[0] == counts[1] > 0 and correct
    for kernel, most, n, changes in CANDIDATES:
        scores = []
        for number, change in enumerate(changes):
            times = [
                r["us"]
                for r in rows
                if r["what"] == "candidate"
                and (r["kernel"], r["most"], r["number"]) == (kernel, most, number)
                and "us" in r
            ]
            if len(times) == len(shapes):
                scores.append((sum(map(math.log, times)), number, change))
        settings = dict(min(scores)[2]) if scores else {}
        settings["pdl"] = bool(complete and pdl[1] < pdl[0]) and n <= 16
        found.setdefault(kernel, []).append([most, settings])
    for kernel, entries in found.items():  # ranges that were not tuned stay as they are
        entries += [[most, {}] for most, _ in DEFAULTS[kernel] if most not in [entry[0] for entry in entries]]
        entries.sort(key=lambda entry: entry[0] or 1 << 62)
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over that of `want`."""
    return float((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm())


def check(device: str, write, cases, pdl: bool = False) -> None:
    """Rounding and products against the reference in float64."""
    for d, n in cases:
        side, (x, types), weight = input_side(d, rank=24), rows_of(n, d), random_weight(192, d, rank=24)
        options = (side.clip, 4, False, side.tables.branch)
        exact = reference.round_rows(x.double(), types, side.found, *options, torch.float64)
        want = reference.w4_linear(exact, types, weight, torch.float64, torch.float64)
        row = {"what": "check", "k": d, "n": n, "pdl": pdl}
        tables, weight = to(side.tables, device), to(weight, device)
        x, types = x.to(device), types.to(device)
        try:
            got = rounding_triton.round_rows(x, types, tables, options={"pdl": pdl})
            row["codes_off"] = (got.codes.cpu().int() != exact.codes.int()).double().mean().item()
            for name, product in (("w4", w4_triton), ("dp4a", dp4a_triton)):
                if name == "w4" or n <= 4:
                    y = product.w4_linear(got, types, weight, torch.bfloat16, options={"pdl": pdl})
                    row[f"{name}_y"] = error(y, want)
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        write(row)


def main() -> None:
    """Compile in parallel, or check, measure and choose."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=90, help="stop measuring after so long")
    parser.add_argument("--worker", type=int, help="compile every workers-th candidate and end (used internally)")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache and end")
    args = parser.parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench("cuda")
    if args.worker is not None:
        for labels, calls in jobs(bench, SHAPES)[args.worker :: args.workers]:
            try:
                calls[0]()
            except Exception as failure:  # the measuring process reports it again
                print(labels, failure)
        return
    if args.compile_only:
        workers = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.speed.tune", *sys.argv[1:], "--worker", str(i)])
            for i in range(args.workers)
        ]
        for worker in workers:
            try:
                worker.wait(timeout=max(1.0, args.seconds - (time.monotonic() - begin)))
            except subprocess.TimeoutExpired:
                worker.kill()
        return
    rows: list[dict] = []
    with open(args.out / "tune.jsonl", "w", encoding="utf-8") as file:

        def write(row: dict) -> None:
            rows.append(row)
            text = json.dumps(row)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        cases = ((576, 3), (4096, 4), (14336, 70))
        check("cuda", write, cases)
        everything = jobs(bench, SHAPES)
        for dependent in (False, True):  # dependent launches last: were one to hang, the rest is written
            if dependent:
                check("cuda", write, cases, pdl=True)
            for labels, calls in everything:
                if labels.get("pdl", False) is not dependent or time.monotonic() - begin > args.seconds:
                    continue
                try:
                    value, spread = graph_microseconds(calls, rounds=5, at_least=1e-3)
                    write({**labels, "us": round(value, 2), "spread": round(spread, 2)})
                except Exception as failure:
                    write({**labels, "failed": f"{type(failure).__name__}: {failure}"[:200]})
            chosen = choose(rows, SHAPES)
            (args.out / "launches.json").write_text(json.dumps(chosen, indent=1), encoding="utf-8")
        write({"what": "end", "seconds": time.monotonic() - begin})
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
