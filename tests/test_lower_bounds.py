"""The constraints file names each user-facing dependency at its lowest version, and nothing else."""

from packaging.requirements import Requirement

from tools.lower_bounds import PYPROJECT, lower_bounds


TEXT = """
[project]
dependencies = [
    "torch>=2.9",
    "rich>=13,<14",  # a comment with ]
]
[project.optional-dependencies]
merge = ["mergekit>=0.1.5", "POT>=0.9.6"]
kernels = ["triton>=3.5; platform_system == 'Linux'"]
dev = ["own[merge]", "pytest>=8"]
peers = ["hqq>=0.2"]
[tool.other]
include = ["not>=1"]
"""


def test_bounds_of_a_small_project():
    assert lower_bounds(TEXT) == {
        "torch": "2.9",
        "rich": "13",
        "mergekit": "0.1.5",
        "POT": "0.9.6",
        "triton": "3.5",
    }


def test_every_dependency_of_ours_has_a_lower_bound():
    text = PYPROJECT.read_text(encoding="utf-8")
    core = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    listed = [Requirement(line.strip().strip('",')) for line in core.splitlines() if line.strip().startswith('"')]
    assert len(listed) >= 5
    bounds = lower_bounds(text)
    for requirement in listed:
        assert bounds[requirement.name] in requirement.specifier
    assert {"trl", "mergekit", "matplotlib"} <= bounds.keys()
    assert "pytest" not in bounds
