"""What a user's type checker sees: public names have types, and wrong uses are found without running anything."""

import ast
import importlib
import inspect
import subprocess
import sys
import types

import pytest

from tests.test_layering import PACKAGES, ROOT
from tools.site import homes


GOOD = """
from pathlib import Path

from mergekit_ot import PlanBundle, PlanSettings, Recipe, load_bundle, load_recipe
from optimum_freeact import FreeActConfig, save
from trl_mlc import consistency_loss

recipe: Recipe = load_recipe("recipe.yml")
bundle: PlanBundle = load_bundle(Path("plans"))
settings: PlanSettings = recipe.settings
scheme: str = FreeActConfig(preset="rtn", weight_bits=8).scheme
folder: Path = save(object(), "out", overwrite=True)
alone = consistency_loss(object(), temperature=0.5).per_group
"""

#: A wrong line, and the kind of error that mypy must report for it.
WRONG = {
    "recipe: int = load_recipe('recipe.yml')": "assignment",
    "load_recipe(3)": "arg-type",
    "load_bundle('plans').no_such_field": "attr-defined",
    "consistency_loss(object(), temprature=0.5)": "call-arg",
    "FreeActConfig().scheme.no_such_method()": "attr-defined",
    "from trl_mlc import NoSuchTrainer": "attr-defined",
}


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    pytest.importorskip("mypy", reason="mypy is not installed")
    cache = tmp_path_factory.mktemp("mypy")

    def run(*programs: str) -> list[str]:
        folder = tmp_path_factory.mktemp("programs")
        paths = [folder / f"program_{i}.py" for i in range(len(programs))]
        for path, program in zip(paths, programs):
            path.write_text(program)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--cache-dir",
            str(cache),
            "--config-file",
            str(ROOT / "pyproject.toml"),
        ]
        done = subprocess.run(
            [*command, "--no-error-summary", *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if "error:" in line]

    return run


def test_right_and_wrong_programs(check):
    imports = "\n".join(
        line for line in GOOD.splitlines() if line.startswith(("from mergekit", "from optimum", "from trl"))
    )
    errors = check(GOOD, *(f"{imports}\n{line}\n" for line in WRONG))
    assert [line for line in errors if "program_0.py" in line] == []
    for number, (line, kind) in enumerate(WRONG.items(), start=1):
        assert [e for e in errors if f"program_{number}.py" in e and f"[{kind}]" in e], f"not found: {line}"


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_every_public_name(package):
    """Lazily imported names are imported under TYPE_CHECKING, too: the two lists are one."""
    source = ast.parse((ROOT / package / "__init__.py").read_text())
    seen = {a.asname or a.name: n.module for n in ast.walk(source) if isinstance(n, ast.ImportFrom) for a in n.names}
    for name, module in homes(package).items():
        assert seen.get(name) == module, name


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_and_classes_are_annotated(package):
    """Every argument of a public function, and of the constructor of a public class of ours, says its type."""
    missing = []
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        function = value if isinstance(value, types.FunctionType) else value.__dict__.get("__init__")
        if not isinstance(function, types.FunctionType) or function.__module__.partition(".")[0] != package:
            continue
        for argument in inspect.signature(function).parameters.values():
            variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
            if argument.name != "self" and not variadic and argument.annotation is argument.empty:
                missing.append(f"{name}({argument.name})")
        if (
            isinstance(value, types.FunctionType)
            and inspect.signature(function).return_annotation is inspect.Signature.empty
        ):
            missing.append(f"{name} -> ?")
    assert missing == []
