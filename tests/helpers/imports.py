"""What each file of a package imports, read with `ast` (nothing is executed), and the rules that follow from it.

Imports inside functions count: they are arrows too, only drawn later. Imports under `if TYPE_CHECKING:` do not.
"""

import ast
import fnmatch
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name (`package.file` or `package.file.name`), and where it stands."""

    target: str
    line: int
    at_module_level: bool


@dataclass(frozen=True)
class Source:
    """One file of a package: path relative to the package, parsed tree, imports."""

    package: str
    path: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def where(self) -> str:
        return f"{self.package}/{self.path}"

    @property
    def module(self) -> str:
        return ".".join([self.package, *Path(self.path).with_suffix("").parts]).removesuffix(".__init__")


def read_package(folder: Path) -> list[Source]:
    """All Python files of a package folder, in order of their paths."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        relative = path.relative_to(folder)
        parents = [folder.name, *relative.parent.parts]
        imports = tuple(_imports(tree, parents))
        found.append(Source(folder.name, relative.as_posix(), tree, imports))
    return found


def _imports(tree: ast.Module, parents: list[str]) -> Iterator[Import]:
    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from walk(other, top)
            elif isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = parents[: len(parents) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield from (Import(f"{module}.{alias.name}", child.lineno, top) for alias in child.names)
            else:
                inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, top and not inner)

    return walk(tree, True)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _file(target: str, modules: Mapping[str, Source]) -> Source | None:
    """The file that an import names: itself, or the one that holds the imported name; None outside the package."""
    for name in (target, target.rpartition(".")[0]):
        if name in modules:
            return modules[name]
    return None


def foreign(sources: Iterable[Source], forbidden: Iterable[str]) -> list[str]:
    """Imports of packages that must not be known here at all."""
    names = set(forbidden)
    return [
        f"{source.where}:{one.line} imports {one.target}"
        for source in sources
        for one in source.imports
        if _top(one.target) in names
    ]


def through_init(sources: list[Source]) -> list[str]:
    """Imports of a sibling's name through a package's `__init__` instead of the file that defines it."""
    modules = {source.module: source for source in sources}
    found = []
    for source in sources:
        for one in source.imports:
            if _top(one.target) != source.package:
                continue
            held_by = _file(one.target, modules)
            if held_by is None:
                found.append(f"{source.where}:{one.line} imports {one.target}, which is no file of the package")
            elif held_by.path.endswith("__init__.py"):
                found.append(
                    f"{source.where}:{one.line} imports {one.target} through {held_by.where}; import the file"
                )
    return found


def cycles(sources: list[Source]) -> list[str]:
    """Circles among the files of a package, each named once, as `a -> b -> a`."""
    modules = {source.module: source for source in sources}
    arrows = {
        source.path: sorted(
            {
                held_by.path
                for one in source.imports
                if _top(one.target) == source.package and (held_by := _file(one.target, modules)) and held_by != source
            }
        )
        for source in sources
    }
    found, done = [], set()

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            circle = trail[trail.index(path) :]
            first = circle.index(min(circle))
            found.append(" -> ".join([*circle[first:], *circle[:first], circle[first]]))
        elif path not in done:
            for other in arrows[path]:
                visit(other, [*trail, path])
            done.add(path)

    for path in arrows:
        visit(path, [])
    return sorted(set(found))


def upward(sources: list[Source], floors: list[list[str]]) -> list[str]:
    """Imports from a lower floor to a higher one; `floors` are path patterns from cellar to roof."""
    modules = {source.module: source for source in sources}

    def floor(path: str) -> int | None:
        return next((i for i, patterns in enumerate(floors) if matches(path, patterns)), None)

    found = []
    for source in sources:
        here = floor(source.path)
        for one in source.imports:
            held_by = _file(one.target, modules) if _top(one.target) == source.package else None
            there = floor(held_by.path) if held_by else None
            if here is not None and there is not None and there > here:
                found.append(f"{source.where}:{one.line} (floor {here}) imports {held_by.where} (floor {there})")
    return found


def undeclared(sources: list[Source], always: Iterable[str], optional: Mapping[str, list[str]]) -> list[str]:
    """Third-party imports that are neither always installed nor allowed in this very file."""
    known = {*always, *sys.stdlib_module_names, "__future__"}
    found = []
    for source in sources:
        for one in source.imports:
            name = _top(one.target)
            if name in known or name == source.package:
                continue
            if name not in optional:
                found.append(f"{source.where}:{one.line} imports {name}, which no extra of the package declares")
            elif not matches(source.path, optional[name]):
                found.append(f"{source.where}:{one.line} imports {name}; only {optional[name]} may")
    return found


def prints(sources: Iterable[Source], allowed: list[str]) -> list[str]:
    """Calls of `print` outside the allowed files."""
    return [
        f"{source.where}:{node.lineno} prints; use logging or return the text"
        for source in sources
        if not matches(source.path, allowed)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def function_text(file: Path, name: str) -> str:
    """Source of a function of a file."""
    text = file.read_text(encoding="utf-8")
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_source_segment(text, found)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path fits one of the patterns; `*` does not cross a folder."""
    return any(path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
