"""Wheel and sdist: everything of ours is in them, and nothing else."""

import pytest

from tools.package import build, problems


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    pytest.importorskip("build", reason="build is not installed")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77, here is {setuptools.__version__}")
    return build(tmp_path_factory.mktemp("dist"), isolated=False)


def test_archives_are_complete(archives):
    assert problems(*archives) == []


def test_missing_and_stray_files_are_seen(archives, tmp_path):
    import zipfile

    wheel, sdist = archives
    poor = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(poor, "w") as archive:
        for name in whole.namelist():
            if name != "trl_mlc/py.typed":
                archive.writestr(name, whole.read(name))
        archive.writestr("tests/test_x.py", "")
    assert problems(poor, sdist) == ["the wheel lacks trl_mlc/py.typed", "the wheel holds tests/test_x.py"]
