"""A process that does one job after another, so that imports and a GPU's start are paid once.

python -m benchmarks.token_types.worker        # jobs as lines of JSON in, {"rows": ...} or {"error": ...} out
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.token_types.jobs import Job, perform
from tools import result_files


class Worker:
    """The other end: a process on one GPU; it is started anew after an end.

    Args:
        gpu: Its `CUDA_VISIBLE_DEVICES`.
        threads: Of the CPU; `None` leaves it to torch.
        log: Where its output goes.
    """

    def __init__(self, gpu: str, threads: int | None, log: Path):
        self.gpu, self.threads, self.log = gpu, threads, log
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin importing, if it does not run."""
        if self.process is not None and self.process.poll() is None:
            return
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": self.gpu, "TOKENIZERS_PARALLELISM": "false"}
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.token_types.worker"],
                **{"cwd": result_files.ROOT, "env": environment},
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": sink},
            )

    def ask(self, job: Job, seconds: float | None) -> dict:
        """The job's rows or its error; a job that takes longer ends the process."""
        self.start()
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.stop()
            return {"error": "ended: the time was up"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._ended()

    def _ended(self) -> dict:
        code = self.process.wait()
        tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        return {"error": f"the process ended with {code}: {' | '.join(tail)}"}

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def main() -> int:
    """Do the jobs of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the log
    import gc
    import traceback

    import torch

    import benchmarks.token_types.diffusion_world
    import benchmarks.token_types.vision_world  # noqa: F401
    from benchmarks.token_types.warm import warm_up

    asked = select.select([sys.stdin], [], [], 1.0)[0]  # then it is to train, and the others wait for it
    if torch.cuda.is_available() and not asked:
        warm_up()
        gc.collect()
        torch.cuda.empty_cache()  # while it waits, others train
    for line in sys.stdin:
        job, start = Job.from_json(line), time.perf_counter()
        print(f"--- {job.name}", file=sys.stderr, flush=True)
        try:
            told = {"rows": perform(job)}
        except Exception as error:
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        print(f"--- {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        answers.write(json.dumps(told) + "\n")
        answers.flush()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
