"""`python -m optimum_freeact.run`: a program runs as if it had been called itself."""

import json
import sys

import pytest

from optimum_freeact.run import USAGE, main


SHOW = "import json, sys\nprint(json.dumps([__name__, sys.argv, sys.path[0]]))\n"


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_script_sees_its_own_name_arguments_and_folder(tmp_path, capsys):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    main([str(script), "--a", "1"])
    assert json.loads(capsys.readouterr().out) == ["__main__", [str(script), "--a", "1"], str(tmp_path)]


def test_a_module_is_found_from_the_current_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "shown_module.py").write_text(SHOW)
    monkeypatch.chdir(tmp_path)
    main(["-m", "shown_module", "x"])
    name, arguments, first = json.loads(capsys.readouterr().out)
    assert (name, arguments[1:], first) == ("__main__", ["x"], str(tmp_path))
    assert arguments[0].endswith("shown_module.py")


def test_a_command_is_found_on_the_path(tmp_path, capsys, monkeypatch):
    command = tmp_path / "shown-command"
    command.write_text("#!/usr/bin/env python\n" + SHOW)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    main(["shown-command", "y"])
    assert json.loads(capsys.readouterr().out)[1] == [str(command), "y"]


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"]])
def test_without_a_program_it_says_how(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE


def test_an_unknown_program_is_named():
    with pytest.raises(SystemExit, match="'no-such-command' is neither a file nor a command"):
        main(["no-such-command"])


def test_a_programs_own_failure_comes_through(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit) as caught:
        main([str(script)])
    assert caught.value.code == 3
