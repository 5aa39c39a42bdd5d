"""Jobs side by side: in the order asked for, equal to one after another, and an error that names itself."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.training.pool import map_jobs
from workbench.training.record import Record


def square(x):
    time.sleep(0.02 * (x % 3))
    return x * x, torch.get_num_threads(), os.getpid()


def fails_at_three(x):
    if x == 3:
        raise WorkbenchError("three is refused")
    return x


def interrupted(x):
    return signal.getsignal(signal.SIGINT)


def waits(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


def dies(x):
    os._exit(9)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_the_order_asked_for_from_one_thread_workers(tmp_path):
    record = Record(tmp_path)
    found = map_jobs(square, range(8), workers=2, cost=float, record=record, text="squares")
    assert [r[0] for r in found] == [x * x for x in range(8)]
    assert {r[1] for r in found} == {1} and os.getpid() not in {r[2] for r in found}
    assert '"done": 8, "total": 8' in (tmp_path / "progress.json").read_text()


def test_an_interrupt_ends_workers_without_a_traceback():
    assert map_jobs(interrupted, [1, 2], workers=2) == [signal.SIG_DFL] * 2


def test_one_worker_or_one_item_runs_here_the_dearest_first():
    order = []
    assert map_jobs(lambda x: order.append(x) or -x, [2, 5, 3], workers=1, cost=float) == [-2, -5, -3]
    assert order == [5, 3, 2]
    assert map_jobs(square, [4], workers=2)[0][2] == os.getpid()
    assert map_jobs(square, [], workers=2) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through_as_it_was_raised(workers):
    with pytest.raises(WorkbenchError, match="three is refused"):
        map_jobs(fails_at_three, range(6), workers=workers)


def test_a_killed_worker_is_one_line_and_the_next_call_works():
    with pytest.raises(WorkbenchError, match="a worker of lost causes was killed"):
        map_jobs(dies, range(4), workers=2, text="lost causes")
    assert [r[0] for r in map_jobs(square, range(3), workers=2)] == [0, 1, 4]


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import pathlib, sys, test_pool\n"
        "from workbench.training.pool import map_jobs\n"
        "map_jobs(test_pool.waits, [pathlib.Path(sys.argv[1]) / n for n in 'ab'], workers=2)"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": path})
    numbers = [tmp_path / n for n in "ab"]
    until = time.monotonic() + 120
    while not all(n.exists() and n.read_text() for n in numbers):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while any(alive(int(n.read_text())) for n in numbers):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)
