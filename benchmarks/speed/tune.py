"""Try launch settings and designs of every kernel on a GPU: correctness against the reference, then times.

    python -m benchmarks.speed.tune --out DIR --compile-only [--workers 16]
    python -m benchmarks.speed.tune --out DIR [--seconds 90]

The first compiles all candidates in parallel into Triton's cache; the second measures them one by one and writes
`tune.jsonl` (one line a candidate) as it goes. A candidate that fails is a line with the error.
"""
# ruff: noqa: B008, B023

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.speed import alternatives
from benchmarks.speed.timing import copies_for, graph_microseconds
from optimum_freeact.kernels import dp4a_triton, reference, rounding_triton, w4_triton
from optimum_freeact.kernels.tables import InputTables
from tests.freeact.kernels.cases import input_side, random_weight, rows_of, to


SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
SMALL = ((96, 64), (192, 128))


class Bench:
    """Tensors of one (K, N), made on demand on the device and kept."""

    def __init__(self, device: str):
        self.device, self.kept = device, {}

    def get(self, key, make):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def side(self, d: int, rank: int = 24) -> InputTables:
        return self.get(("side", d, rank), lambda: to(input_side(d, rank=rank).tables, self.device))

    def rows(self, n: int, d: int):
        def make():
            x = torch.randn(n, d, device=self.device) * torch.exp(torch.randn(d, device=self.device))
            return x.bfloat16(), torch.randint(0, 2, (n,), device=self.device)

        return self.get(("rows", n, d), make)

    def rounded(self, n: int, d: int, rank: int = 24) -> reference.Rows:
        def make():
            codes = torch.randint(-8, 8, (n, d), dtype=torch.int8, device=self.device)
            stats = torch.stack((torch.rand(n), torch.randn(n), torch.zeros(n))).to(self.device)
            stats[2] = codes.sum(1)
            branch = torch.randn(n, 32, device=self.device) if rank else None
            if rank:
                branch[:, rank:] = 0
            return reference.Rows(codes, stats, branch)

        return self.get(("rounded", n, d, rank), make)

    def weight(self, m: int, d: int, copy: int = 0, rank: int = 24) -> reference.Weight:
        def make():
            w = to(random_weight(m, 16, rank=rank), self.device)
            packed = torch.randint(0, 256, (m, d // 2), dtype=torch.uint8, device=self.device)
            row_sum = ((packed & 15).int() + (packed >> 4).int() - 16).sum(1, dtype=torch.int32)
            return w._replace(packed=packed, row_sum=row_sum)

        return self.get(("weight", m, d, copy, rank), make)

    def dense(self, m: int, d: int, dtype, copy: int = 0):
        def make():
            if dtype == torch.int8:
                return torch.randint(-8, 8, (m, d), dtype=dtype, device=self.device)
            return (torch.randn(m, d, device=self.device) * 0.02).to(dtype)

        return self.get(("dense", m, d, dtype, copy), make)


def candidates(bench: Bench, shapes, many: tuple[int, ...]):
    """(labels, calls) of everything to measure, most informative first."""
    for d, m in shapes:
        few_copies = copies_for(m * d // 2)
        for n in (1, 4, 16):
            yield (
                {"what": "linear", "provider": "bf16", "n": n, "k": d, "m": m},
                lambda n=n, d=d, m=m: [
                    lambda c=c: torch.nn.functional.linear(bench.rows(n, d)[0], bench.dense(m, d, torch.bfloat16, c))
                    for c in range(copies_for(m * d * 2))
                ],
            )
        for n in (1, 4):
            for bn in (2, 4, 8, 16, 32):
                wide = 1 << (d // 8 - 1).bit_length()
                for warps in (2, 4, 8):
                    if 16 <= bn * wide // (32 * warps) <= 128:
                        yield (
                            {"what": "few", "provider": "dp4a", "n": n, "k": d, "m": m, "BN": bn, "warps": warps},
                            lambda n=n, d=d, m=m, bn=bn, warps=warps: [
                                lambda c=c: dp4a_triton.w4_linear(
                                    bench.rounded(n, d), bench.rows(n, d)[1], bench.weight(m, d, c), torch.bfloat16,
                                    options={"BN": bn, "warps": warps},
                                )
                                for c in range(few_copies)
                            ],
                        )  # fmt: skip
        for n in (1, 16):
            for bn, bk, warps, stages, split in (
                (64, 128, 4, 4, 1), (64, 128, 4, 4, 2), (64, 128, 4, 4, 4), (64, 256, 4, 3, 2), (64, 256, 4, 3, 4),
                (32, 128, 2, 5, 1), (32, 256, 4, 4, 1), (32, 256, 4, 4, 2), (32, 256, 2, 4, 2), (128, 128, 4, 4, 2),
                (128, 128, 8, 4, 4), (16, 256, 2, 4, 1), (16, 512, 4, 3, 1),
            ):  # fmt: skip
                yield (
                    {"what": "few", "provider": "mma", "n": n, "k": d, "m": m, "BN": bn, "BK": bk, "warps": warps,
                     "stages": stages, "SPLIT": split},
                    lambda n=n, d=d, m=m, o={"BN": bn, "BK": bk, "warps": warps, "stages": stages, "SPLIT": split}: [
                        lambda c=c: w4_triton.w4_linear(
                            bench.rounded(n, d), bench.rows(n, d)[1], bench.weight(m, d, c), torch.bfloat16, options=o
                        )
                        for c in range(few_copies)
                    ],
                )  # fmt: skip
        for n in (1, 16):
            for warps in (4, 8, 16):
                for chunk in (256, 512, 1024):
                    yield (
                        {"what": "round", "provider": "fused", "n": n, "k": d, "m": m, "warps": warps, "chunk": chunk},
                        lambda n=n, d=d, o={"warps": warps, "chunk": chunk}: [
                            lambda: rounding_triton.round_rows(*bench.rows(n, d), bench.side(d), few=True, options=o)
                        ],
                    )
        for n in many if d == m else many[:1]:
            yield (
                {"what": "linear", "provider": "bf16", "n": n, "k": d, "m": m},
                lambda n=n, d=d, m=m: [
                    lambda: torch.nn.functional.linear(bench.rows(n, d)[0], bench.dense(m, d, torch.bfloat16))
                ],
            )
            for fast in (False, True):
                yield (
                    {"what": "product", "provider": "fp8", "fast": fast, "n": n, "k": d, "m": m},
                    lambda n=n, d=d, m=m, fast=fast: [
                        lambda x=bench.get(("x8", n, d), lambda: bench.rounded(n, d).codes.to(torch.float8_e4m3fn)), w=bench.get(("w8", m, d), lambda: bench.dense(m, d, torch.int8).to(torch.float8_e4m3fn)): (
                            alternatives.float8_product(
                                x, w, bench.rounded(n, d).stats[0], bench.weight(m, d).qscale, fast
                            )
                        )
                    ],
                )
            for o in (
                {"rows": 16, "project_chunk": 256, "project_warps": 4, "rotate_warps": 4},
                {"rows": 16, "project_chunk": 256, "project_warps": 8, "rotate_warps": 8},
                {"rows": 16, "project_chunk": 512, "project_warps": 8, "rotate_warps": 8, "programs": 132 * 3},
                {"rows": 16, "project_chunk": 128, "project_warps": 4, "rotate_warps": 4, "programs": 132 * 4},
                {"rows": 32, "project_chunk": 256, "project_warps": 8, "rotate_warps": 4, "programs": 132 * 8},
                {"rows": 16, "project_chunk": 256, "project_stages": 4, "rotate_warps": 8, "programs": 132 * 1},
            ):
                yield (
                    {"what": "round", "provider": "two", "n": n, "k": d, "m": m, **o},
                    lambda n=n, d=d, o=o: [
                        lambda: rounding_triton.round_rows(*bench.rows(n, d), bench.side(d), few=False, options=o)
                    ],
                )
            for way, tma, bm, bn, bk, warps, stages in (
                ("left", False, 128, 128, 64, 4, 4), ("left", False, 128, 128, 64, 8, 4),
                ("left", False, 128, 128, 128, 8, 3), ("left", False, 256, 128, 64, 8, 4),
                ("left", False, 128, 256, 64, 8, 4), ("left", False, 256, 64, 64, 4, 4),
                ("left", True, 128, 128, 64, 8, 4), ("left", True, 256, 128, 64, 8, 4),
                ("left", True, 128, 128, 128, 8, 3), ("left", True, 256, 128, 128, 8, 3),
                ("right", False, 128, 128, 64, 8, 4), ("right", False, 128, 256, 64, 8, 3),
                ("right", True, 128, 256, 64, 8, 3), ("right", True, 128, 128, 128, 8, 3),
                ("rows", False, 128, 256, 128, 8, 3), ("rows", True, 128, 256, 128, 8, 3),
                ("rows", True, 128, 256, 128, 8, 4), ("rows", True, 128, 128, 128, 4, 4),
            ):  # fmt: skip
                o = {"way": way, "tma": tma, "BM": bm, "BN": bn, "BK": bk, "warps": warps, "stages": stages}
                yield (
                    {"what": "product", "provider": "int8", "n": n, "k": d, "m": m, **o},
                    lambda n=n, d=d, m=m, o=o: [
                        lambda: alternatives.product(
                            bench.rounded(n, d).codes,
                            bench.dense(m, d, torch.int8) if o["way"] == "rows" else bench.weight(m, d).packed,
                            bench.rounded(n, d).stats[0], bench.weight(m, d).qscale, **o,
                        )
                    ],
                )  # fmt: skip
            for bm, bn, bk, warps, stages in (
                (128, 128, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 128, 8, 3),
            ):  # fmt: skip
                o = {"BM": bm, "BN": bn, "BK": bk, "warps": warps, "stages": stages}
                yield (
                    {"what": "many", "provider": "mma", "n": n, "k": d, "m": m, **o},
                    lambda n=n, d=d, m=m, o=o: [
                        lambda: w4_triton.w4_linear(
                            bench.rounded(n, d), bench.rows(n, d)[1], bench.weight(m, d), torch.bfloat16, options=o
                        )
                    ],
                )


def check(device: str, write) -> None:
    """Every kernel against the reference in float64, on sizes of real models; torch's own error beside it."""
    for d, n, rank in (
        (576, 7, 24), (896, 33, 24), (1536, 40, 24), (4096, 5, 24), (4096, 64, 0), (11008, 20, 24), (14336, 20, 24),
        (4864, 20, 24), (18944, 3, 24),
    ):  # fmt: skip
        side = input_side(d, rank=rank)
        x, types = rows_of(n, d)
        weight = random_weight(192, d, rank=rank)
        exact = reference.round_rows(
            x.double(), types, side.found, side.clip, 4, False, side.tables.branch, torch.float64
        )
        want = reference.w4_linear(exact, types, weight, torch.float64, torch.float64)
        own = reference.round_rows(
            x.to(device), types.to(device), side.found.to(device), side.clip.to(device), 4, False, side.tables.branch
        )
        own = reference.w4_linear(to(own, device), types.to(device), to(weight, device), torch.bfloat16)
        row = {"what": "check", "k": d, "n": n, "rank": rank, "torch": error(own, want)}
        tables, weight = to(side.tables, device), to(weight, device)
        x, types = x.to(device), types.to(device)
        for name, few in (("fused", True), ("two", False)):
            try:
                got = rounding_triton.round_rows(x, types, tables, few=few)
                row[f"{name}_codes_off"] = (got.codes.cpu().int() != exact.codes.int()).double().mean().item()
                row[f"{name}_most_off"] = (got.codes.cpu().int() - exact.codes.int()).abs().max().item()
                row[f"{name}_stats"] = error(got.stats[:2], exact.stats[:2])
                y = w4_triton.w4_linear(got, types, weight, torch.bfloat16)
                row[f"{name}_y"] = error(y, want)
            except Exception as failure:
                row[f"{name}_failed"] = f"{type(failure).__name__}: {failure}"[:300]
        given = to(exact, device)
        given = reference.Rows(given.codes, given.stats.float(), None if not rank else given.branch.float())
        want = reference.w4_linear(exact, types.cpu(), to(weight, "cpu"), torch.float64, torch.float64)
        products = {
            "mma": lambda: w4_triton.w4_linear(given, types, weight, torch.float32),
            "mma_split": lambda: w4_triton.w4_linear(
                given, types, weight, torch.float32, options={"BM": 64, "BN": 64, "BK": 64, "SPLIT": 3, "stages": 3}
            ),
            "dp4a": lambda: dp4a_triton.w4_linear(
                reference.Rows(given.codes[:3].contiguous(), given.stats[:, :3].contiguous(),
                               None if not rank else given.branch[:3].contiguous()),
                types[:3].contiguous(), weight, torch.float32,
            ),
        }  # fmt: skip
        for name, call in products.items():
            try:
                y = call()
                row[name] = error(y, want[: len(y)])
                row[f"{name}_again"] = error(call(), want[: len(y)])
            except Exception as failure:
                row[f"{name}_failed"] = f"{type(failure).__name__}: {failure}"[:300]
        write(row)
    x, types = rows_of(4, 576)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for few in (True, False):
        got = rounding_triton.round_rows(x.to(device), types.to(device), to(input_side(576).tables, device), few=few)
        y = w4_triton.w4_linear(got, types.to(device), to(random_weight(64, 576), device), torch.bfloat16)
        write({"what": "nan", "few": few, "rows_all_nan": y.isnan().all(1).tolist(), "any": y.isnan().any(1).tolist()})


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over that of `want`."""
    return float((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm())


def main() -> None:
    """Compile in parallel, check, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=90, help="stop measuring after so long")
    parser.add_argument("--worker", type=int, help="compile every workers-th candidate and end (used internally)")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache and end")
    parser.add_argument("--tiny", action="store_true", help="miniature sizes, no times: a test of this script")
    args = parser.parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.tiny else "cuda"
    shapes, many = (SMALL, (128,)) if args.tiny else (SHAPES, (2048, 8192))
    bench = Bench(device)
    if args.worker is not None:
        for index, (_, calls) in enumerate(candidates(bench, shapes, many[:1])):
            if index % args.workers == args.worker:
                try:
                    calls()[0]()
                except Exception:  # the measuring process reports it
                    continue
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
    with open(args.out / "tune.jsonl", "w", encoding="utf-8") as file:

        def write(row: dict) -> None:
            text = json.dumps(row)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        write({"what": "machine", "torch": torch.__version__, "cpus": os.cpu_count()})
        check(device, write)
        write({"what": "checked", "seconds": time.monotonic() - begin})
        for labels, calls in candidates(bench, shapes, many):
            if time.monotonic() - begin > args.seconds:
                write({"what": "stopped", "seconds": time.monotonic() - begin})
                break
            if args.tiny and labels["n"] * labels["m"] * labels["k"] > 3e6:
                continue
            try:
                if args.tiny:
                    calls()[0]()
                    write(labels)
                else:
                    value, spread = graph_microseconds(calls(), rounds=5)
                    write({**labels, "us": round(value, 2), "spread": round(spread, 2)})
            except Exception as failure:
                write({**labels, "failed": f"{type(failure).__name__}: {failure}"[:200]})
        write({"what": "end", "seconds": time.monotonic() - begin})


if __name__ == "__main__":
    main()
