"""Benchmarks' jobs in lanes: every job once, no more at a time than lanes, GPUs in turn."""

import threading
import time

import pytest

from benchmarks._lanes import gpus, run_in_lanes


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_job_runs_once_on_the_lanes_gpu(lanes):
    lock, done, running, most = threading.Lock(), [], 0, 0

    def work(job, gpu):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
            done.append((job, gpu))

    run_in_lanes(range(9), lanes, ["0", "1"], work)
    assert sorted(job for job, _ in done) == list(range(9))
    assert most == lanes
    assert {gpu for _, gpu in done} == ({"0", "1"} if lanes > 1 else {"0"})


def test_a_lane_takes_the_first_job_that_may_start_and_the_first_of_all_where_none_may():
    order, running, lock = [], set(), threading.Lock()

    def may_start(job):
        free = job > 2 or not running
        if job <= 2 and free:
            running.add(job)
        return free

    def work(job, gpu):
        order.append(job)
        time.sleep(0.05 if job <= 2 else 0.005)
        with lock:
            running.discard(job)

    run_in_lanes(range(5), 2, [""], work, may_start)
    assert sorted(order) == list(range(5))
    assert order[:3] == [0, 3, 4]  # one of the first three at a time, while there are others
    assert {1, 2} == set(order[3:])


def test_a_cpu_has_one_lane_without_a_gpu_and_a_given_choice_is_kept(monkeypatch):
    assert gpus("cpu") == [""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus("cuda") == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpus("cuda") == [""]
