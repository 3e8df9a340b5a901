"""What is read is never run, nothing is fetched behind the user's back, and writes stay where they belong."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import forked
from tests.helpers.quantized import answer, fresh_python
from tests.test_layering import PACKAGES, ROOT


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

#: Calls that run what they read, or a shell. `eval` as a method (`model.eval()`) is another thing.
FORBIDDEN = {
    "pickle.load", "pickle.loads", "dill.load", "dill.loads", "cloudpickle.load", "joblib.load", "torch.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "os.system", "os.popen",
    "numpy.load", "np.load", "marshal.loads", "shelve.open",
}  # fmt: skip


def calls(source: str) -> list[str]:
    """Dotted names of everything a source file calls, and of the modules it imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found.append(ast.unparse(node.func))
            if any(keyword.arg == "shell" for keyword in node.keywords):
                found.append("shell")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    assert {*calls(path.read_text())} & {
        *FORBIDDEN,
        "pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "shell",
    } == set()


def test_forbidden_calls_are_seen():
    source = "import pickle, yaml\nyaml.load(x)\nmodel.eval()\nsubprocess.run(c, shell=True)\neval(x)\n"
    assert {"pickle", "yaml.load", "shell", "eval"} <= set(calls(source))
    assert "model.eval" in calls(source)


WATCH = """
import json, os, sys
seen = {"net": [], "pickle": [], "writes": [], "run": []}
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if not (event == "socket.connect" and isinstance(args[1], str)):  # a path: a socket of this machine
            seen["net"].append([event, str(args[-1])[:80]])
    elif event == "pickle.find_class":
        seen["pickle"].append(".".join(map(str, args)))
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        seen["run"].append(str(args[:2])[:120])
    elif event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
        if args[2] & (os.O_WRONLY | os.O_RDWR):
            seen["writes"].append(os.path.abspath(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link"):
        seen["writes"].append(os.path.abspath(os.fspath(args[1] if event == "os.rename" else args[0])))
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_asks_no_network_and_runs_nothing(package):
    """Everything public is looked up, so that lazily imported files are loaded too; the hub is not forbidden here."""
    code = (
        WATCH
        + f"""
os.environ.pop("HF_HUB_OFFLINE")
import {package}
for name in {package}.__all__: getattr({package}, name)
print(json.dumps(seen))
"""
    )
    seen = answer(fresh_python(code))
    assert seen["net"] == []
    assert [call for call in seen["run"] if "ldconfig" not in call and "uname" not in call and "gcc" not in call] == []


COMMANDS = {
    "freeact": [["quantize", "no-org/no-model", "out", "--dataset", "texts.txt"], ["inspect", "no-org/no-model"]],
    "mergekit_ot": [["check", "recipe.yml"], ["run", "recipe.yml", "out"]],
    "trl_mlc": [["scan", "--model_name_or_path", "no-org/no-model", "--dataset_name", "no-org/no-data"]],
}


@pytest.mark.parametrize("package", COMMANDS)
def test_offline_commands_ask_no_network_and_say_so(package, tmp_path):
    (tmp_path / "texts.txt").write_text("some words\n" * 2000)
    recipe = {"merge_method": "transport", "base_model": "no-org/target", "models": [{"model": "no-org/donor"}]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe | {"calibration": {"dataset": "texts.txt"}}))
    module = {"freeact": "optimum_freeact.cli"}.get(package, f"{package}.cli")
    code = (
        WATCH
        + f"""
import contextlib, io
os.chdir(sys.argv[1]); os.environ["HF_HUB_OFFLINE"] = "1"
from {module} import main
seen["said"] = []
for words in {COMMANDS[package]!r}:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(words)
    seen["said"].append([code, errors.getvalue().strip().splitlines()[-1]])
seen["files"] = sorted(os.listdir("."))
print(json.dumps(seen))
"""
    )
    seen = answer(forked.run(str(tmp_path), code=code))
    assert seen["net"] == []
    assert all(code in (1, 2) and len(said) > 30 for code, said in seen["said"])
    assert seen["files"] == ["recipe.yml", "texts.txt"]


def test_a_quantized_model_loads_without_unpickling(tmp_path):
    """Saving, loading and resuming: the interpreter reports every class that an unpickler looks up; there is none."""
    code = (
        WATCH
        + """
import torch
from tests.helpers.quantized import quantized, reload, settings, logits
model = quantized("llama", resume_dir=sys.argv[1] + "/blocks")
model.save_pretrained(sys.argv[1] + "/out")
again = reload(sys.argv[1] + "/out")
quantized("llama", resume_dir=sys.argv[1] + "/blocks")
seen["equal"] = torch.equal(logits(model), logits(again))
seen["writes"] = sorted({os.path.relpath(path, sys.argv[1]).split("/")[0] for path in seen["writes"] if not path.endswith(".pyc")})
print(json.dumps(seen))
"""
    )
    seen = answer(forked.run(str(tmp_path), code=code))
    assert seen["equal"]
    assert seen["pickle"] == []


TRAVERSALS = ["../../escape", "/tmp/concord-escape", "a/../../../escape", "~/escape", "$(touch escape)"]


def test_paths_in_a_recipe_write_only_into_the_output(tmp_path):
    """Every text in a recipe that could be a path points elsewhere; the merge writes into OUT and the plans' folder."""
    from tests.merge.test_pipeline import pair, write_recipe

    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    _, target, donor = pair(inside)
    path = write_recipe(inside, target, donor, alpha=0.5)
    recipe = yaml.safe_load(path.read_text())
    for i, evil in enumerate(TRAVERSALS):
        changed = recipe | {"chat_template": evil}
        changed["parameters"] = recipe["parameters"] | {"alpha": [{"filter": evil, "value": 0.1}, {"value": 0.5}]}
        (inside / f"evil{i}.yml").write_text(yaml.safe_dump(changed))
        (inside / f"plan{i}.yml").write_text(yaml.safe_dump(recipe | {"parameters": {"plan": evil}}))
        text = recipe["calibration"] | {"dataset": evil}
        (inside / f"text{i}.yml").write_text(yaml.safe_dump(recipe | {"calibration": text}))
    code = (
        WATCH
        + """
import contextlib, io, glob
os.chdir(sys.argv[1])
import torch; torch.set_num_threads(1)
from mergekit_ot.cli import main
seen["writes"], seen["codes"] = [], {}
for name in sorted(glob.glob("*.yml")):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        seen["codes"][name] = main(["run", name, "out-" + name, "--plans", "plans", "--quiet"])
print(json.dumps(seen))
"""
    )
    seen = answer(forked.run(str(inside), code=code))
    allowed = tuple(str(inside / name) for name in ("out-", ".out-", "plans", ".plans"))
    elsewhere = {w for w in seen["writes"] if not w.startswith(allowed)} - set(map(str, [inside, *inside.parents]))
    assert sorted(w for w in elsewhere if "escape" in w or w.startswith(str(tmp_path))) == []
    assert not list(tmp_path.rglob("*escape*"))
    assert not Path("/tmp/concord-escape").exists()
    assert seen["run"] == []
    assert {code for name, code in seen["codes"].items() if name.startswith(("plan", "text"))} == {1}
    assert json.dumps(seen["codes"])  # recipes whose only fault is a strange chat template may succeed
