"""Disks that fill up and folders that cannot be written: one line, nothing half-written, and the input untouched."""

import json
import resource
import signal
import sys

import pytest

from tests.helpers import forked
from tests.hostile.disk import JOBS
from tests.hostile.outcomes import tree


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and users of Linux")


@pytest.fixture(scope="module")
def attempts():
    run = forked.run(module="tests.hostile.disk")
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {(attempt["kind"], attempt["job"]): attempt for attempt in found}


@pytest.mark.parametrize("job", JOBS)
def test_a_write_that_fails_half_way(attempts, job):
    found = attempts["full", job]
    assert found["code"] in (1, 2)
    assert "File too large" in found["said"]
    assert found["finished"] == []
    assert found["changed"] == []
    # what a next run resumes from may stay: blocks, activation rows, the host's checkpoints and their card
    kept = ("blocks", "plans.rows", "out/checkpoint-", "out/README.md")
    assert [name for name in found["left"] if not name.startswith(kept)] == []


@pytest.mark.parametrize("job", JOBS)
def test_a_folder_that_cannot_be_written(attempts, job):
    found = attempts["read-only", job]
    assert found["code"] in (1, 2)
    assert "Permission denied" in found["said"]
    assert (found["finished"], found["left"], found["changed"]) == ([], [], [])


@pytest.mark.parametrize("size", [1, 3000, 60_000])
def test_save_says_how_much_is_free_and_leaves_the_old_folder(tmp_path, size):
    """`save` in this process, where a limit can be taken back."""
    from optimum_freeact import save
    from tests.helpers.quantized import quantized

    model = quantized("llama")
    save(model, tmp_path / "out")
    before = tree(tmp_path)
    old_signal, old_limit = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old_limit[1]))
    try:
        with pytest.raises(OSError, match=r"nothing was left there.*MB are free") as caught:
            save(model, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_signal)
    assert "27" in str(caught.value)
    assert tree(tmp_path) == before
