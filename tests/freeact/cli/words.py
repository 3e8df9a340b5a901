"""What the tests of the command line say to it, and how they read its answers."""

from optimum_freeact.cli import main


TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, 0123456789 times! "
OTHER = "Sphinx of black quartz, judge my vow: how vexingly quick daft zebras jump. "
SMALL = ["--n-samples", "4", "--seq-len", "32", "--batch-size", "2", "--quiet"]
WINDOWS = ["--window", "32", "--tokens", "256", "--quiet"]


def paths(home, *names):
    return [str(home / name) for name in names]


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fails(capsys, *words):
    """The command line exits with 2 and says one line."""
    capsys.readouterr()
    assert main(list(words)) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    assert err.startswith("freeact")
    return err
