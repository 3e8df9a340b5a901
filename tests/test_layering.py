"""The rules of the house, checked: who may import whom, what an import costs, and no trace of anyone's machine.

The tables below are the floor plan. To give a file a new optional dependency, name it here: that is the review.
"""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import imports


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optimum_freeact", "trl_mlc", "mergekit_ot")
NEVER = ("tests", "tools", "benchmarks", "examples")

# Installed with `pip install hf-concord`, directly or by transformers: any file may import them.
ALWAYS = ("torch", "transformers", "accelerate", "safetensors", "tqdm", "rich") + (
    "numpy",
    "tokenizers",
    "huggingface_hub",
    "packaging",
)

# Optional dependency: the files whose job it is. A pattern for a file that is still to be written is fine.
OPTIONAL = {
    "optimum_freeact": {
        "triton": ["kernels/*.py"],
        "matplotlib": ["report/plots.py", "report/type_plots.py"],
        "datasets": ["calibration/data.py"],
        "peft": ["hf/lora.py", "hf/peft.py"],
        "gguf": [],
    },
    "trl_mlc": {
        "trl": [
            "arguments.py",
            "mixin.py",
            "early_exit.py",
            "sft.py",
            "dpo.py",
            "kto.py",
            "reward.py",
            "cpo.py",
            "orpo.py",
            "cli.py",
            "command_options.py",
        ],
        "datasets": ["data.py", "parallel.py", "rows.py", "evaluation/*.py"],
        "peft": ["mixin.py", "early_exit.py"],
        "matplotlib": ["plots.py"],
    },
    "mergekit_ot": {
        "mergekit": ["method.py", "registration.py", "pipeline.py", "cli.py", "report/evaluate.py"],
        "trl": ["trainer.py"],
        "yaml": ["recipe.py", "card.py"],
        "click": ["cli.py"],
        "ot": ["solvers.py"],
        "scipy": ["solvers.py"],
        "matplotlib": ["report/plots.py"],
    },
}

# From cellar to roof; a file that stands on no floor here is not checked for direction, only for circles.
FLOORS = {
    "optimum_freeact": [
        [
            "numerics/*.py",
            "config.py",
            "config_*.py",
            "cache_name.py",
            "type_rules.py",
            "type_state.py",
            "token_types.py",
            "type_hooks.py",
        ],
        ["moments.py", "transforms/*.py", "rounding/*.py", "kernels/*.py"],
        ["modules/*.py", "models/*.py"],
        ["calibration/*.py"],
        ["hf/*.py"],
        ["report/*.py"],
        ["commands/*.py"],
        ["cli.py"],
    ],
    "trl_mlc": [
        ["losses.py", "pooling.py", "extractor.py"],
        ["arguments.py", "data.py", "early_exit.py"],
        ["mixin.py"],
        ["sft.py", "dpo.py", "kto.py", "reward.py", "cpo.py", "orpo.py", "evaluation/*.py", "plots.py"],
        ["cli.py"],
    ],
    "mergekit_ot": [
        ["costs.py", "plan.py", "sinkhorn.py", "folders.py", "digest.py", "disk.py"],
        ["solvers.py", "transport.py", "maps.py", "rows.py"],
        ["anchors.py", "activations.py", "structure.py", "layer_map.py"],
        ["solve.py", "bundle.py"],
        ["method.py", "registration.py", "recipe.py", "pipeline.py", "adaptation.py", "controls.py"],
        ["report/*.py"],
        ["cli.py"],
    ],
}

# Never loaded by importing one of our packages, whatever is installed.
HEAVY = ("matplotlib", "trl", "mergekit", "datasets", "triton", "peft", "ot", "gguf")


@pytest.fixture(scope="module", params=PACKAGES)
def sources(request):
    return imports.read_package(ROOT / request.param)


def name_of(sources):
    return sources[0].package


def test_packages_never_import_each_other(sources):
    others = [package for package in PACKAGES if package != name_of(sources)]
    assert imports.foreign(sources, [*others, *NEVER]) == []


def test_what_stands_in_two_packages_is_one_text():
    """Too little for a package of its own, and they may not import each other: so the copies are held together here."""
    files = ROOT / "optimum_freeact" / "scratch.py", ROOT / "mergekit_ot" / "folders.py"
    for function in ("scratch_beside", "_alive"):
        texts = {imports.function_text(file, function) for file in files}
        assert len(texts) == 1, f"{function} differs between {' and '.join(map(str, files))}"


def test_siblings_are_imported_by_file(sources):
    assert imports.through_init(sources) == []


def test_no_import_circle(sources):
    assert imports.cycles(sources) == []


def test_arrows_point_down(sources):
    assert imports.upward(sources, FLOORS[name_of(sources)]) == []


def test_optional_dependencies_stay_in_their_files(sources):
    assert imports.undeclared(sources, ALWAYS, OPTIONAL[name_of(sources)]) == []


def test_only_the_command_line_prints(sources):
    assert imports.prints(sources, ["cli.py"]) == []


def test_the_rules_see_violations(tmp_path):
    """Each rule reports a package built to break it, so that none of the tests above can pass by blindness."""
    files = {
        "__init__.py": "from house.roof import top\n",
        "roof.py": "import triton\nfrom house import top\nfrom house.cellar import stone\n",
        "cellar.py": "def stone():\n    from house.wall import brick\n    print(brick)\n",
        "wall.py": "import numpy, tests.helpers\nfrom . import roof\nfrom .cellar import stone\n",
        "sub/__init__.py": "",
        "sub/leaf.py": (
            "from typing import TYPE_CHECKING\nfrom ..cellar import stone\nfrom .. import gone\n"
            "if TYPE_CHECKING:\n    import pandas\n    from house.sub import other\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = imports.read_package(tmp_path / "house")

    assert imports.foreign(house, ["tests"]) == ["house/wall.py:1 imports tests.helpers"]
    assert imports.through_init(house) == [
        "house/roof.py:2 imports house.top through house/__init__.py; import the file",
        "house/sub/leaf.py:3 imports house.gone through house/__init__.py; import the file",
    ]
    assert imports.cycles(house) == [
        "__init__.py -> roof.py -> __init__.py",
        "cellar.py -> wall.py -> cellar.py",
        "cellar.py -> wall.py -> roof.py -> cellar.py",
    ]
    assert imports.upward(house, [["cellar.py"], ["wall.py"], ["roof.py"]]) == [
        "house/cellar.py:2 (floor 0) imports house/wall.py (floor 1)",
        "house/wall.py:2 (floor 1) imports house/roof.py (floor 2)",
    ]
    assert imports.undeclared(house, ["numpy"], {"triton": ["kernels/*.py"], "tests": ["*.py"]}) == [
        "house/roof.py:1 imports triton; only ['kernels/*.py'] may"
    ]
    assert imports.undeclared(house, [], {"triton": ["*.py"], "tests": ["*.py"]}) == [
        "house/wall.py:1 imports numpy, which no extra of the package declares"
    ]
    assert imports.prints(house, ["cli.py"]) == ["house/cellar.py:3 prints; use logging or return the text"]
    assert imports.prints(house, ["cellar.py"]) == []


# --- the cost of an import ---------------------------------------------------------------------------------------


def in_fresh_python(code: str) -> dict:
    """Run code in a new interpreter at the repository root; it prints one JSON object last."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@functools.cache
def loaded_by_transformers() -> frozenset[str]:
    """What transformers' quantizer base loads by itself, given what is installed: not ours to answer for."""
    code = "import json, sys, transformers; from transformers.quantizers.base import HfQuantizer\n"
    code += "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    return frozenset(in_fresh_python(code))


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_brings_nothing_heavy(package):
    code = f"import json, sys, {package}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    ours = set(in_fresh_python(code)) - loaded_by_transformers()
    assert ours & {*HEAVY, *PACKAGES} == {package}


def test_freeact_imports_in_a_moment():
    """At most 0.3 s of processor time on top of transformers and its quantizer base; the best of three, as noise adds."""
    code = (
        "import json, time, transformers\n"
        "from transformers.quantizers.base import HfQuantizer\n"
        "start = time.process_time()\n"
        "import optimum_freeact\n"
        "print(json.dumps({'seconds': time.process_time() - start}))"
    )
    seconds = []
    for _ in range(3):
        seconds.append(in_fresh_python(code)["seconds"])
        if seconds[-1] <= 0.3:
            break
    assert min(seconds) <= 0.3


# --- the repository ----------------------------------------------------------------------------------------------

HOST_PATH = re.compile(r"(?<![\w.:/*~})-])/(?:work|home|root|Users|mnt|scratch)/[\w.-]+|[A-Z]:\\\\?Users")


def tracked_files() -> list[Path]:
    """Files under version control; skips where the code came without its history."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_path_of_somebodys_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and archives
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in HOST_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize(("text", "wrong"), [("see /{}/me/model", True), ("https://x.org/{}/a", False)])
@pytest.mark.parametrize("folder", ["work", "home", "root", "Users"])
def test_machine_paths_are_recognised(text, wrong, folder):
    assert bool(HOST_PATH.search(text.format(folder))) is wrong


def test_no_tracked_file_is_large():
    assert [path.name for path in tracked_files() if path.stat().st_size > 1_000_000] == []


def test_files_that_begin_first_exist():
    from tests.conftest import LONG

    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in LONG if names.count(name) != 1] == []
