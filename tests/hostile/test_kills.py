"""One killed run of each long job; `benchmarks/hostile/run.py` kills fifty and more."""

import json
import sys

import pytest

from tests.helpers import forked
from tests.hostile.kills import JOBS


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills processes")
def test_a_killed_run_goes_on_to_the_same_result():
    run = forked.run(",".join(JOBS), "2", "1", "1", module="tests.hostile.kills")
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [(trial["job"], trial["equal"], trial["partial"], trial["left"], trial["why"]) for trial in found] == [
        (name, True, 0, 0, "") for name in JOBS
    ]
    assert sum(trial["kills"] for trial in found) >= 3
