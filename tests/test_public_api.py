"""What a package offers: declared, sorted, documented, and nothing else by accident."""

import importlib
import importlib.metadata
import re
import types
from pathlib import Path

import pytest

from tests.test_layering import PACKAGES, ROOT


def pages() -> str:
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])


def problems(module: types.ModuleType, documentation: str) -> list[str]:
    """What is wrong with a package's public face."""
    found = [] if (module.__doc__ or "").strip() else ["the package has no docstring"]
    offered = getattr(module, "__all__", [])
    if len(set(offered)) != len(offered):
        found.append("__all__ names something twice")
    for name in offered:
        try:
            value = getattr(module, name)
        except AttributeError:
            found.append(f"{name} is in __all__ but does not exist")
            continue
        if name.startswith("__"):
            continue
        if isinstance(value, (type, types.FunctionType)) and not (value.__doc__ or "").strip():
            found.append(f"{name} has no docstring")
        if not re.search(rf"\b{re.escape(name)}\b", documentation):
            found.append(f"{name} is in no page of README or docs")
    for name, value in vars(module).items():
        own = getattr(value, "__module__", "").partition(".")[0] == module.__name__
        if own and not name.startswith("_") and name not in offered and isinstance(value, (type, types.FunctionType)):
            found.append(f"{name} is public but not in __all__")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_declared_and_documented(package):
    assert problems(importlib.import_module(package), pages()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed_and_installed(package):
    assert (ROOT / package / "py.typed").is_file()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"{package}*"' in pyproject
    assert f'{package} = ["py.typed"' in pyproject


def test_problems_are_seen():
    module = types.ModuleType("fake")

    def undocumented():
        pass

    def hidden():
        """Documented but not offered."""

    for function in (undocumented, hidden):
        function.__module__ = "fake.file"
        setattr(module, function.__name__, function)
    module.__all__ = ["gone", "undocumented", "undocumented"]
    assert problems(module, "nothing about it") == [
        "the package has no docstring",
        "__all__ names something twice",
        "gone is in __all__ but does not exist",
        "undocumented has no docstring",
        "undocumented is in no page of README or docs",
        "undocumented has no docstring",
        "undocumented is in no page of README or docs",
        "hidden is public but not in __all__",
    ]
    module.__doc__, undocumented.__doc__, module.__all__ = "Fake.", "Do it.", ["hidden", "undocumented"]
    assert problems(module, "Call `undocumented` and `hidden`.") == []


def test_console_scripts_point_at_code_that_exists():
    """Each installed command of ours resolves; one whose file is still to be written is not checked."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].partition("\n[")[0]
    scripts = dict(re.findall(r'^([\w-]+) = "([\w.:]+)"$', text, re.MULTILINE))
    assert scripts
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        if (ROOT / Path(*module.split("."))).with_suffix(".py").is_file():
            assert callable(getattr(importlib.import_module(module), function)), name


# --- documentation that cannot rot --------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_between_pages_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_samples_compile_and_import_what_exists(page):
    import ast

    for sample in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(sample)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                offered = getattr(importlib.import_module(node.module), "__all__", None)
                if offered is not None:  # a package that is still to be written has none
                    assert {alias.name for alias in node.names} <= set(offered)


def test_the_first_screen_of_the_readme_holds_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    commands = re.findall(r"^\s*(make [a-z-]+)", first_screen, re.MULTILINE)
    assert commands == ["make first-run", "make test"]
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in commands:
        target = command.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert re.search(rf"\bmake\b.*\b{target}\b", ci), f".ci/run does not run {command}"


def test_each_package_has_a_command_that_shows_it():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    shown = re.findall(r"^make (first-[a-z]+)", readme, re.MULTILINE)
    assert shown == ["first-run", "first-align", "first-merge"]
    offered = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for target in shown:
        (kind,) = re.findall(rf"^{target}: \$\(VENV\)/\.installed-([a-z]+)", makefile, re.MULTILINE)
        (extras,) = re.findall(rf"^EXTRAS_{kind} = (.*)", makefile, re.MULTILINE)
        assert set(extras.split(",")) <= offered, target


def test_every_page_of_docs_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    others = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"]
    assert [str(path) for path in others if f"]({path})" not in index] == []


def test_ruff_is_the_same_everywhere():
    pinned = re.findall(r"ruff==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert len(set(pinned)) == 1
    assert set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())) == set(pinned)
