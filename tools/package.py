"""Build wheel and sdist, look into them, install each into a fresh environment and use it there.

    python -m tools.package                     # newest versions that the registry offers
    python -m tools.package --lowest            # the lower bounds of pyproject.toml, exactly
    python -m tools.package --extras align,merge,plots --keep DIR

Needs `build`. What is installed is used outside the repository by `tools/first_use.py`: every public name is looked up, a
tiny model is quantized, trained, merged, and each command runs. `benchmarks/packaging/run.py` does so for many versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.lower_bounds import lower_bounds  # noqa: E402


COMMANDS = {"optimum_freeact": "freeact", "trl_mlc": "trl-mlc", "mergekit_ot": "mergekit-ot"}
PACKAGES = tuple(COMMANDS)
SOURCES = (*PACKAGES, "optimum")  # the last is a namespace of Optimum's, with one file of ours
FIRST_USE = ROOT / "tools" / "first_use.py"
#: What a checkout's tests need besides the packages themselves.
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil")


def run(*command: str | Path, cwd: Path | None = None, **changes: str) -> str:
    """Run a command and give its output; a failure shows it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build(folder: Path, isolated: bool) -> tuple[Path, Path]:
    """Build both from the repository; the wheel is made from the sdist, so that the sdist is known to be whole."""
    run(sys.executable, "-m", "build", *([] if isolated else ["--no-isolation"]), "--outdir", folder, ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def problems(wheel: Path, sdist: Path) -> list[str]:
    """What is missing from the archives, or does not belong into them."""
    files = (path for package in SOURCES for path in (ROOT / package).rglob("*") if path.is_file())
    sources = {str(path.relative_to(ROOT)) for path in files if path.parent.name != "__pycache__"}
    names = set(zipfile.ZipFile(wheel).namelist())
    found = [f"the wheel lacks {name}" for name in sorted(sources - names)]
    found += [f"the wheel holds {n}" for n in sorted(names - sources) if ".dist-info/" not in n]
    found += [
        f"the wheel lacks {n}" for n in ("LICENSE", "NOTICE") if not any(m.endswith(f"licenses/{n}") for m in names)
    ]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = sources | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    return found + [f"the sdist lacks {name}" for name in sorted(needed - inside)]


@dataclass
class Environment:
    """A fresh virtual environment with one of the archives in it."""

    folder: Path
    python: str = sys.executable
    lowest: bool = False
    torch: str = ""

    @property
    def interpreter(self) -> Path:
        """Its own Python."""
        return self.folder / "bin" / "python"

    def install(self, archive: Path, extras: str, *more: str) -> None:
        """Make it, and install the archive with its extras, with the lower bounds exactly if that is asked for."""
        run(self.python, "-m", "venv", self.folder)
        bounds = lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8")) if self.lowest else {}
        if self.torch:
            bounds.pop("torch", None)
        constraints = self.folder / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
        pip = [self.interpreter, "-m", "pip", "install", "-q", "--no-compile", "-c", constraints]
        if self.torch:
            run(*pip, self.torch)
        run(*pip, f"{archive}[{extras}]" if extras else archive, *more)

    def use(self, package: str) -> dict:
        """Run a package once for real, outside the repository, and its command; returns what was found."""
        with tempfile.TemporaryDirectory() as elsewhere:
            run(self.folder / "bin" / COMMANDS[package], "--help", cwd=Path(elsewhere))
            said = run(self.interpreter, FIRST_USE, package, cwd=Path(elsewhere), HF_HUB_OFFLINE="1")
        return json.loads(said.strip().splitlines()[-1])

    def versions(self) -> dict[str, str]:
        """Versions of the hosts that are installed."""
        return json.loads(run(self.interpreter, FIRST_USE))["versions"]

    def test(self, *paths: str) -> tuple[dict[str, int], list[str]]:
        """Run the repository's tests with what is installed here; returns counts, and the tests that failed."""
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *paths]
        done = subprocess.run([self.interpreter, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        last = done.stdout.strip().splitlines()[-1]
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
        return counts, re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


def packages_of(extras: str) -> list[str]:
    """The packages that an installation with these extras can use."""
    return [
        "optimum_freeact",
        *(["trl_mlc"] if "align" in extras else []),
        *(["mergekit_ot"] if "merge" in extras else []),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowest", action="store_true", help="install the lower bounds of pyproject.toml exactly")
    parser.add_argument("--extras", default="align,merge,plots,peft", help="default %(default)s; empty for none")
    parser.add_argument(
        "--torch", default=os.environ.get("TORCH", ""), help="torch to install first, as a requirement"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools that is here")
    parser.add_argument("--only-build", action="store_true", help="build and look into the archives")
    parser.add_argument("--keep", type=Path, help="put the archives here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name) / "dist"
        wheel, sdist = build(folder, not options.no_isolation)
        wrong = problems(wheel, sdist)
        for problem in wrong:
            print(problem, file=sys.stderr)
        if wrong:
            return 1
        print(
            f"{wheel.name} ({wheel.stat().st_size / 1e3:.0f} kB), {sdist.name} ({sdist.stat().st_size / 1e3:.0f} kB)"
        )
        for archive in [] if options.only_build else [wheel, sdist]:
            extras = options.extras if archive == wheel else ""
            place = Path(name) / archive.suffix.strip(".")
            environment = Environment(place, options.python, options.lowest, options.torch)
            environment.install(archive, extras)
            for package in packages_of(extras):
                found = environment.use(package)
                print(
                    f"{archive.name}[{extras}]: {package} works ({found['seconds'][package]} s), {found['versions']}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
