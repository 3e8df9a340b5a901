"""Launch settings from a file: what it changes, what it leaves, and what is wrong with it, said before any kernel runs."""

import json

import pytest
import torch

from optimum_freeact.kernels import dispatch


LAYER = {"weight_bits": 4, "activation_bits": 4, "group_size": None, "transform": "hadamard", "width": 64}


@pytest.fixture
def launches(device, monkeypatch, tmp_path):  # noqa: ARG001
    """The module, and a function that writes a file of settings and makes it the one in use."""
    from optimum_freeact.kernels import launches as module

    def use(text):
        path = tmp_path / "launches.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        monkeypatch.setenv(module.ENVIRONMENT, str(path))
        module._settings.cache_clear()
        return module

    yield use
    module._settings.cache_clear()


def test_a_file_changes_what_it_names_and_nothing_else(launches):
    module = launches({"w4": [[64, {"stages": 2}], [300, {"BM": 64}]], "pass_1024": [[None, {"ask": 9}]]})
    assert module.w4_launch(40, 512, 4096)["stages"] == 2
    assert module.w4_launch(40, 512, 4096)["BK"] == 128  # as it was
    assert module.w4_launch(16, 512, 4096)["stages"] == 4  # an entry of its own, not named
    assert module.w4_launch(200, 1 << 20, 4096)["BM"] == 64  # between 64 and 300 rows there was no entry of its own
    assert module.w4_launch(301, 1 << 20, 4096)["BM"] == 128
    assert module.pass_launch(2048, 1024, {})["ask"] == 9
    assert module.pass_launch(2048, 2048, {}) == module.DEFAULTS["pass_2048"][-1][1]
    assert module.DEFAULTS["pass_1024"][-1][1]["ask"] != 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold an object like"),
        ({"w5": []}, "names the kernel 'w5'; known are"),
        ({"w4": {"stages": 3}}, "must hold an object like"),
        ({"w4": [[16, 3]]}, "must hold an object like"),
        ({"w4": [["all", {}]]}, "must hold an object like"),
        ({"w4": [[True, {}]]}, "must hold an object like"),
        ({"w4": [[None, {"stagse": 3}]]}, "names the settings ['stagse'] of 'w4'; known are ['BK',"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(launches, text, words):
    module = launches(text)
    with pytest.raises(ValueError, match="FREEACT_LAUNCHES=.*launches.json") as error:
        module.check_launches()
    assert words in str(error.value)


def test_it_is_refused_when_layers_are_prepared(launches, monkeypatch, tmp_path):
    """Where a kernel runs it would count as the kernel's failure, and torch would quietly take its place."""
    module = launches({})
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert dispatch.plan("cuda", **LAYER).name == "triton"
    monkeypatch.setenv(module.ENVIRONMENT, str(tmp_path / "absent.json"))
    module._settings.cache_clear()
    with pytest.raises(ValueError, match=r"absent.json' cannot be read"):
        dispatch.plan("cuda", **LAYER)
