"""What `mkdocs` needs beyond the pages: the repository's own Markdown files, and API pages made from `__all__`.

A page in docs/ may link to a file of the repository (`../README.md`) and reads well there; on the site, README,
CONTRIBUTING and CHANGELOG are pages of their own, and a link to any other file of the repository becomes its name.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optimum_freeact", "trl_mlc", "mergekit_ot")
ADOPTED = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\((docs/[^)\s]+)\)")  # only files outside docs/ name one so
REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")


def homes(package: str) -> dict[str, str]:
    """Public name -> module that defines it, read from the package's `__init__` without importing it."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            found |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values)
            found |= {
                key.value: value.value
                for key, value in pairs
                if isinstance(key, ast.Constant)
                and isinstance(value, ast.Constant)
                and str(value.value).startswith(package)
            }
    return {name: module for name, module in sorted(found.items()) if not name.startswith("_")}


def api_page(package: str) -> str:
    """Markdown of a package's API page: one entry per public name, from its docstring."""
    entries = "\n\n".join(f"::: {module}.{name}" for name, module in homes(package).items())
    return f"# API of `{package}`\n\nMade from the docstrings. Everything here is imported from `{package}` itself.\n\n{entries}\n"


def relink(markdown: str, page: str, pages: set[str]) -> str:
    """Point links at the site's pages; a link to another file of the repository becomes its name in code style.

    Args:
        markdown: the page's text.
        page: its place in the repository, such as `docs/freeact.md` or `README.md`.
        pages: places of all pages in `docs/`, relative to it.
    """
    here = posixpath.dirname(posixpath.relpath(page, "docs")) if page.startswith("docs/") else ""

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match.group()
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        inside = ADOPTED.get(place) or (posixpath.relpath(place, "docs") if place.startswith("docs/") else None)
        if inside in pages:
            return f"[{text}]({posixpath.relpath(inside, here or '.')}{'#' + anchor if anchor else ''})"
        return f"{text} (`{place}`)" if (ROOT / place).exists() else match.group()

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)

    def shown(match: re.Match) -> str:
        return f"![{match[1]}]({posixpath.relpath(match[2], posixpath.join('docs', here))})"

    return "".join(part if part.startswith("```") else PICTURE.sub(shown, LINK.sub(replace, part)) for part in parts)


# ---------------------------------------------------------------- mkdocs calls these by name
def on_files(files, config):
    """Add the adopted pages and the API pages."""
    from mkdocs.structure.files import File

    for source, name in ADOPTED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown, page, config, files):  # noqa: ARG001
    """Rewrite links of the repository to links of the site."""
    names = {name: source for source, name in ADOPTED.items()}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return relink(markdown, source, {file.src_uri for file in files})


def on_page_content(html, page, config, files):  # noqa: ARG001
    """Turn transformers' way to refer to a name, [`Name`], into a link to its API entry."""
    known = {name: (package, f"{module}.{name}") for package in PACKAGES for name, module in homes(package).items()}

    def replace(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        if name not in known:
            return f"<code>{match[1]}</code>"
        package, identifier = known[name]
        depth = "../" * page.url.rstrip("/").count("/") + ("../" if page.url else "")
        return f'<a href="{depth}api/{package}/#{identifier}"><code>{name}</code></a>'

    return REFERENCE.sub(replace, html)
