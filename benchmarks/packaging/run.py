"""Install the wheel into fresh environments of several Pythons, with the lowest and the newest versions, and use it there.

    python benchmarks/packaging/run.py --python python3.10 --python python3.13 [--versions lowest,newest] [--tests PATH ...]

Each finished environment is one line of the progress file and is removed, so that an interrupted run goes on where it
stopped. At the end the result is written to benchmarks/results/packaging.json. An environment takes some six gigabytes of
disk where torch comes with CUDA, and minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks._results import command_line, write  # noqa: E402
from tools.package import TEST_TOOLS, Environment, build, packages_of, problems  # noqa: E402


EXTRAS = ("align", "merge", "plots", "peft")
NEEDS_3_11 = "align"  # TRL 1.16 is not offered for Python 3.10
SHOWN = ("torch", "transformers", "trl", "peft", "mergekit", "POT", "accelerate", "datasets", "numpy")
#: Where our code meets its hosts' inner parts.
TESTS = (
    "tests/freeact/hf", "tests/freeact/test_kv_cache.py", "tests/freeact/test_kv_generate.py",
    "tests/freeact/test_token_types.py", "tests/freeact/test_diffusion_models.py", "tests/mlc/test_trainers.py",
    "tests/mlc/test_other_trainers.py", "tests/merge/test_pipeline.py",
)  # fmt: skip


def version_of(python: str) -> str:
    """Full version of an interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def try_environment(wheel: Path, python: str, versions: str, tests: list[str], folder: Path) -> list[dict]:
    """Rows of one environment."""
    place = {"python": version_of(python), "versions": versions}
    old = place["python"].startswith("3.10.")
    extras = ",".join(name for name in EXTRAS if not (old and name == NEEDS_3_11))
    tests = [path for path in tests if not (old and path.startswith("tests/mlc"))]
    environment = Environment(folder, python, versions == "lowest")
    start = time.perf_counter()
    environment.install(wheel, extras, *(TEST_TOOLS if tests else ()))
    found = environment.versions()
    place |= {name: found.get(name, "–") for name in SHOWN}
    rows = [{**place, "metric": "install_seconds", "value": round(time.perf_counter() - start)}]
    for package in packages_of(extras):
        try:
            environment.use(package)
            rows.append({**place, "metric": package, "value": 1})
        except SystemExit as error:
            print(error, file=sys.stderr)
            rows.append({**place, "metric": package, "value": 0, "note": str(error).strip().splitlines()[-1][:300]})
    if tests:
        counts, failed = environment.test(*tests)
        broken = counts.get("failed", 0) + counts.get("error", 0)
        rows.append({**place, "metric": "tests_passed", "value": counts.get("passed", 0)})
        rows.append({**place, "metric": "tests_failed", "value": broken, "note": ", ".join(failed)[:2000]})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", required=True, help="an interpreter; may be given several times")
    parser.add_argument("--versions", default="lowest,newest", help="default %(default)s")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="default: where our code meets its hosts")
    parser.add_argument("--progress", type=Path, default=ROOT / "out" / "packaging.jsonl")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools that is here")
    options = parser.parse_args()
    options.progress.parent.mkdir(parents=True, exist_ok=True)
    lines = options.progress.read_text().splitlines() if options.progress.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["python"], row["versions"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        wheel, sdist = build(Path(scratch) / "dist", not options.no_isolation)
        if wrong := problems(wheel, sdist):
            raise SystemExit("\n".join(wrong))
        for python in options.python:
            for versions in options.versions.split(","):
                if (version_of(python), versions) in done:
                    continue
                folder = Path(scratch) / "environment"
                found = try_environment(wheel, python, versions, options.tests, folder)
                shutil.rmtree(folder)
                rows += found
                with options.progress.open("a") as stream:
                    stream.writelines(json.dumps(row) + "\n" for row in found)
                print(*found, sep="\n", flush=True)
    path = write("packaging", rows, "benchmarks.packaging.claims", command_line(), [0])
    print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
