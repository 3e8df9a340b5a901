"""Install the wheel into fresh environments of several Pythons, with the lowest and the newest versions, and use it there.

    python benchmarks/packaging/run.py --python python3.10 --python python3.13 [--versions lowest,newest] [--tests PATH ...]

Each finished environment is one line of the progress file and is removed, so that an interrupted run goes on where it
stopped, on the same commit only. What is finished is written to benchmarks/results/packaging.json at the end of every call.
An environment takes some six gigabytes of disk where torch comes with CUDA, and minutes. `--at-most 1` makes one and ends;
with `--only-install` it is kept until a call without uses it, so that loading and computing can be done at different times.
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

from tools.package import TEST_TOOLS, Environment, build, packages_of, problems  # noqa: E402
from tools.result_files import command_line, commit_and_dirty, write  # noqa: E402


EXTRAS = ("align", "merge", "plots", "peft")
NEEDS_3_11 = "align"  # TRL 1.16 is not offered for Python 3.10
SHOWN = ("torch", "transformers", "trl", "peft", "mergekit", "POT", "accelerate", "datasets", "numpy")
#: Where our code meets its hosts' inner parts.
TESTS = (
    "tests/freeact/hf", "tests/freeact/test_kv_cache.py", "tests/freeact/test_kv_generate.py",
    "tests/freeact/test_token_types.py", "tests/freeact/test_diffusion_models.py", "tests/freeact/test_cli_masked.py", "tests/mlc/test_trainers.py",
    "tests/mlc/test_other_trainers.py", "tests/merge/test_pipeline.py",
)  # fmt: skip


def version_of(python: str) -> str:
    """Full version of an interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def extras_for(python_version: str) -> str:
    """The extras that can be installed with a Python."""
    old = python_version.startswith("3.10.")
    return ",".join(name for name in EXTRAS if not (old and name == NEEDS_3_11))


def make_environment(wheel: Path, python: str, versions: str, tools: bool, folder: Path) -> Environment:
    """Install into a folder what is wanted, unless that was done before; the seconds it took stand beside it."""
    environment, took = Environment(folder, python, versions == "lowest"), folder / "install_seconds.json"
    if not took.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        environment.install(wheel, extras_for(version_of(python)), *(TEST_TOOLS if tools else ()))
        took.write_text(json.dumps(round(time.perf_counter() - start)))
    return environment


def try_environment(environment: Environment, versions: str, tests: list[str]) -> list[dict]:
    """Rows of one environment."""
    place = {"python": version_of(environment.python), "versions": versions}
    extras = extras_for(place["python"])
    found = environment.versions()
    place |= {name: found.get(name, "–") for name in SHOWN}
    seconds = json.loads((environment.folder / "install_seconds.json").read_text())
    rows = [{**place, "metric": "install_seconds", "value": seconds}]
    for package in packages_of(extras):
        try:
            environment.use(package)
            rows.append({**place, "metric": package, "value": 1})
        except SystemExit as error:
            print(error, file=sys.stderr)
            rows.append({**place, "metric": package, "value": 0, "note": str(error).strip().splitlines()[-1][:300]})
    tests = [path for path in tests if NEEDS_3_11 in extras or not path.startswith("tests/mlc")]
    if tests:
        counts, failed = environment.test(*tests)
        broken = counts.get("failed", 0) + counts.get("error", 0)
        rows.append({**place, "metric": "tests_passed", "value": counts.get("passed", 0)})
        rows.append({**place, "metric": "tests_failed", "value": broken, "note": ", ".join(failed)[:2000]})
    return rows


def built_once(commit: str, folder: Path, isolated: bool) -> tuple[Path, Path]:
    """Wheel and sdist of a commit, from an earlier call where there was one; a changed tree is built each time."""
    place = folder / "dist" / commit[:10]
    if commit.endswith("-dirty") or not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            build(Path(scratch) / "dist", isolated)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            (Path(scratch) / "dist").rename(place)
    return next(place.glob("*.whl")), next(place.glob("*.tar.gz"))


def known_environments(progress: Path) -> list[dict]:
    """What earlier calls finished: `python`, `versions`, `commit` and `rows` of each; other commits' are refused."""
    commit, dirty = commit_and_dirty()
    lines = progress.read_text().splitlines() if progress.exists() else []
    found = [json.loads(line) for line in lines]
    if strange := {line["commit"] for line in found} - {commit + "-dirty" * dirty}:
        raise SystemExit(f"{progress} was made at {', '.join(sorted(strange))}; remove it to begin again.")
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", required=True, help="an interpreter; may be given several times")
    parser.add_argument("--versions", default="lowest,newest", help="default %(default)s")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="default: where our code meets its hosts")
    parser.add_argument("--progress", type=Path, default=ROOT / "out" / "packaging.jsonl")
    parser.add_argument(
        "--at-most", type=int, help="environments to make now; the same command makes the others later"
    )
    parser.add_argument("--only-install", action="store_true", help="make environments, to be used by a later call")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools that is here")
    options = parser.parse_args()
    options.progress.parent.mkdir(parents=True, exist_ok=True)
    known = known_environments(options.progress)
    done = {(line["python"], line["versions"]) for line in known}
    wanted = [(python, versions) for versions in options.versions.split(",") for python in options.python]
    wanted = [(python, versions) for python, versions in wanted if (version_of(python), versions) not in done]
    commit, dirty = commit_and_dirty()
    commit += "-dirty" * dirty
    wheel, sdist = built_once(commit, options.progress.parent, not options.no_isolation)
    if wrong := problems(wheel, sdist):
        raise SystemExit("\n".join(wrong))
    for python, versions in wanted[: options.at_most]:
        place = {"python": version_of(python), "versions": versions, "commit": commit}
        folder = options.progress.parent / "environments" / "-".join((commit[:10], place["python"], versions))
        environment = make_environment(wheel, python, versions, bool(options.tests), folder)
        if options.only_install:
            continue
        known.append({**place, "rows": try_environment(environment, versions, options.tests)})
        with options.progress.open("a") as stream:
            stream.write(json.dumps(known[-1]) + "\n")
        shutil.rmtree(folder)
        print(*known[-1]["rows"], sep="\n", flush=True)
    if options.only_install:
        return 0
    if options.at_most is not None and len(wanted) > options.at_most:
        print(f"{len(wanted) - options.at_most} environments are left; the same command goes on.")
    if not known:
        return 0
    rows = [row for line in sorted(known, key=lambda line: (line["versions"], line["python"])) for row in line["rows"]]
    path = write("packaging", rows, "benchmarks.packaging.claims", command_line(), [0])
    print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
