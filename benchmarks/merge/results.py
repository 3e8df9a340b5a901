"""Write a benchmark's result file: rows as measured, claims computed from them, and where it ran."""

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def git(*arguments: str) -> str:
    """Output of a git command, empty when git or the repository is not here."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """One line on hardware and library versions."""
    import torch
    import transformers

    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    else:
        hardware = f"{torch.get_num_threads()} thread(s) of a {platform.machine()} CPU"
    return f"{hardware}, torch {torch.__version__}, transformers {transformers.__version__}"


def claim(name: str, value: float, compare: str, target: float, how: str) -> dict:
    """A claim with its verdict."""
    holds = value <= target if compare == "<=" else value >= target
    return {"id": name, "value": value, "target": target, "compare": compare, "holds": bool(holds), "how": how}


def write(benchmark: str, rows: list[dict], claims: list[dict], seeds: list[int]) -> Path:
    """Write `benchmarks/results/<benchmark>.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": benchmark,
        "command": "python " + " ".join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "seeds": seeds,
        "rows": rows,
        "claims": claims,
    }
    path = RESULTS / f"{benchmark}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for item in claims:
        print(
            f"{'holds     ' if item['holds'] else 'falls short'} {item['id']} = {item['value']:.4g} ({item['compare']} {item['target']})"
        )
    print(path)
    return path
