"""Solver times side by side: assignment, network simplex, POT's Sinkhorn, the loop here, and a row-streaming loop.

    OMP_NUM_THREADS=1 python benchmarks/merge/solver_times.py --sizes 576 1024

The streaming loop visits the cost in blocks of rows and keeps both potentials, the scheme the paper describes for its
streaming solver; it is written from that description. POT is left out where it is not installed.
"""

import argparse
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from mergekit_ot.costs import correlation, correlation_cost  # noqa: E402
from mergekit_ot.sinkhorn import log_sinkhorn  # noqa: E402
from mergekit_ot.solvers import has_pot, marginal_error, solve_plan  # noqa: E402
from tools.result_files import command_line, write  # noqa: E402


def problem(n_target: int, n_donor: int, device: str) -> torch.Tensor:
    """Two mixtures of shared factors without a true match."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(2048, 64, generator=draw)
    sides = [
        factors @ torch.randn(64, n, generator=draw) + 4 * torch.randn(2048, n, generator=draw)
        for n in (n_target, n_donor)
    ]
    return correlation_cost(correlation(*(side.to(device) for side in sides)))


def streaming(cost: torch.Tensor, reg: float, sweeps: int, block: int = 256) -> torch.Tensor:
    """Log-domain sweeps over blocks of rows."""
    n, m = cost.shape
    f, g = torch.zeros(n, device=cost.device), torch.zeros(m, device=cost.device)
    log_a, log_b = -torch.log(torch.tensor(float(n))), -torch.log(torch.tensor(float(m)))
    for _ in range(sweeps):
        for i in range(0, n, block):
            f[i : i + block] = log_a - torch.logsumexp(g - cost[i : i + block] / reg, dim=1)
        total = torch.full((m,), float("-inf"), device=cost.device)
        for i in range(0, n, block):
            total = torch.logaddexp(total, torch.logsumexp(f[i : i + block, None] - cost[i : i + block] / reg, dim=0))
        g = log_b - total
    return torch.exp(f[:, None] + g - cost / reg)


def timed(function, device: str):
    function_result, seconds = None, []
    for _ in range(3):
        start = time.perf_counter()
        function_result = function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return function_result, sorted(seconds)[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="*", default=[576, 1024, 2048])
    parser.add_argument("--reg", type=float, default=0.03)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = [row for n in options.sizes for row in compare(n, options.reg, options.device)]
    name = "merge_solver_times" + ("_gpu" if options.device.startswith("cuda") else "")
    print(write(name, rows, "benchmarks.merge.solver_times_claims", command_line(), [0]))


def compare(n: int, reg: float, device: str) -> list[dict]:
    """All solvers on one problem."""
    cost = problem(n, n, device)
    _, sweeps, _ = log_sinkhorn(cost, reg)
    solvers = {
        "here, log domain": lambda: log_sinkhorn(cost, reg)[0],
        "streaming loop, same sweeps": lambda: streaming(cost, reg, sweeps),
        "assignment": lambda: solve_plan(cost).coupling,
    }
    if has_pot() and not device.startswith("cuda"):
        wide = problem(n, n + n // 2, device)
        solvers["POT log domain"] = lambda: solve_plan(cost, solver="entropic", reg=reg).coupling
        solvers["POT network simplex, n x 1.5 n"] = lambda: solve_plan(wide).coupling
    rows = []
    for name, function in solvers.items():
        coupling, seconds = timed(function, device)
        row = {"solver": name, "n": n, "reg": reg, "metric": "seconds", "value": seconds, "sweeps": sweeps}
        rows.append(row | {"marginal_error": marginal_error(coupling)})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
