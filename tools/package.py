"""Build wheel and sdist, look into them, install each into a fresh environment and use it there.

    python -m tools.package                     # newest versions that the registry offers
    python -m tools.package --lowest            # the lower bounds of pyproject.toml, exactly
    python -m tools.package --extras align,merge,plots --keep DIR

Needs `build`. What is installed is tried outside the repository: every public name is looked up, and each command runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.lower_bounds import lower_bounds  # noqa: E402


PACKAGES = ("optimum_freeact", "trl_mlc", "mergekit_ot")
TRY = """
import importlib, importlib.metadata, json, sys
from pathlib import Path
names = sys.argv[1].split(",")
for package in names:
    module = importlib.import_module(package)
    place = Path(module.__file__).parent
    assert "site-packages" in str(place), place
    assert (place / "py.typed").is_file(), f"{package} has no py.typed"
    for name in module.__all__:
        getattr(module, name)
found = {}
for name in ("hf-concord", "torch", "transformers", "accelerate", "trl", "mergekit", "peft", "datasets", "POT"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"python": sys.version.split()[0], **found}))
"""


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
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
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


def use(archive: Path, folder: Path, extras: str, lowest: bool, torch: str) -> str:
    """Install an archive with its extras into a new environment and try it; returns the versions found there."""
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", folder)
    constraints = folder / "constraints.txt"
    bounds = lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8")) if lowest else {}
    if torch:
        bounds.pop("torch", None)
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
    install = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", constraints]
    if torch:
        run(*install, torch)
    run(*install, f"{archive}[{extras}]" if extras else archive)
    wanted = ["optimum_freeact"]
    wanted += ["trl_mlc"] if "align" in extras else []
    wanted += ["mergekit_ot"] if "merge" in extras else []
    with tempfile.TemporaryDirectory() as elsewhere:
        said = run(python, "-W", "ignore", "-c", TRY, ",".join(wanted), cwd=Path(elsewhere), HF_HUB_OFFLINE="1")
        commands = {"optimum_freeact": "freeact", "trl_mlc": "trl-mlc", "mergekit_ot": "mergekit-ot"}
        for package in wanted:
            run(folder / "bin" / commands[package], "--help", cwd=Path(elsewhere))
    return said.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowest", action="store_true", help="install the lower bounds of pyproject.toml exactly")
    parser.add_argument("--extras", default="align,merge,plots,peft", help="default %(default)s; empty for none")
    parser.add_argument(
        "--torch", default=os.environ.get("TORCH", ""), help="torch to install first, as a requirement"
    )
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
            said = use(archive, Path(name) / archive.suffix.strip("."), extras, options.lowest, options.torch)
            print(f"{archive.name}[{extras}]: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
