"""Long jobs on a disk that fills up, and in folders that cannot be written; each in a forked process.

    python -m tests.hostile.disk        prints one JSON object for each case

A full disk is a limit on the size of files: as on a real one, writing stops in the middle of a file. A read-only folder
is one of another user, whom the process becomes where it runs as root.
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from tests.hostile.kills import JOBS, _forked, _inside
from tests.hostile.outcomes import tree


#: Largest file in bytes: less than the weights that the job writes, more than all else.
LIMITS = {"calibration": 60_000, "merging": 60_000, "training": 40_000, "planning": 30_000}
NOBODY = 65534


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _become_nobody() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def attempt(name: str, kind: str, folder: Path) -> dict:
    """Run a job under a limit (`full`) or in a folder that it may not write (`read-only`); say what it did."""
    place, log = folder / f"{kind}-{name}", folder / f"{kind}-{name}.log"
    shutil.copytree(folder / name, place)
    log.touch()
    log.chmod(0o666)
    os.environ["HOSTILE_LOG"] = str(log)
    before = tree(place)
    if kind == "read-only":
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    with _inside(place):
        code = _forked(
            lambda: JOBS[name].run(place), lambda: _limit(LIMITS[name]) if kind == "full" else _become_nobody()
        )
    after = tree(place)
    return {
        "job": name,
        "kind": kind,
        "code": code,
        "said": (log.read_text().strip().splitlines() or [""])[-1][:300],
        "finished": [f for f in after if f in ("out/config.json", "plans/plans.json") and f not in before],
        "left": [f for f in after if f not in before],
        "changed": [f for f in before if after.get(f) != before[f]],
    }


def main() -> int:
    """All jobs, both ways."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o777)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # read when `datasets` is imported

        import trl_mlc.cli
        import trl_mlc.dpo  # noqa: F401

        torch.set_num_threads(1)
        for job in JOBS:
            (folder / job).mkdir()
            _forked(lambda job=job: JOBS[job].prepare(folder / job) or 0)
        for kind in ("full", "read-only"):
            for job in JOBS:
                sys.stdout.write(json.dumps(attempt(job, kind, folder)) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
